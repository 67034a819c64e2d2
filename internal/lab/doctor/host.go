package doctor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// host reads the machine. In tests its root is another directory.
type host struct {
	root    string
	release string // as uname -r writes it
	// inotifyFree returns how many inotify instances this user can still create, at most want.
	inotifyFree func(want int) int
}

func thisHost() host {
	h := host{root: "/", inotifyFree: inotifyFree}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.release = unix.ByteSliceToString(u.Release[:])
	}
	return h
}

// inotifyFree creates them to find out: the kernel does not say how many a user has.
func inotifyFree(want int) int {
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for len(fds) < want {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		if err != nil {
			break
		}
		fds = append(fds, fd)
	}
	return len(fds)
}

func (h host) path(p string) string { return filepath.Join(h.root, p) }

// read returns the trimmed text of a file, or "" if it does not exist.
func (h host) read(p string) string {
	data, err := os.ReadFile(h.path(p))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// number returns the first number of a file.
func (h host) number(p string) (int, bool) {
	f := strings.Fields(h.read(p))
	if len(f) == 0 {
		return 0, false
	}
	n, err := strconv.Atoi(f[0])
	return n, err == nil
}

func (h host) exists(p string) bool {
	_, err := os.Stat(h.path(p))
	return err == nil
}

// kernelRemedy returns how to add a feature to the kernel that is in a module of the given name.
func (h host) kernelRemedy(module string) string {
	if _, err := exec.LookPath("modprobe"); err == nil && h.hasModule(module) {
		return "modprobe " + module
	}
	return "this kernel was built without it; use one with the module " + module
}

// hasModule looks for the module where depmod lists those of the running kernel.
func (h host) hasModule(name string) bool {
	file := "/" + name + ".ko"
	for line := range strings.Lines(h.read(filepath.Join("/lib/modules", h.release, "modules.dep"))) {
		path, _, _ := strings.Cut(line, ":")
		path = "/" + strings.ReplaceAll(path, "-", "_")
		if strings.Contains(path, strings.ReplaceAll(file, "-", "_")) {
			return true
		}
	}
	return false
}

// without describes what is missing and what does not work without it. It omits an error that says no more than "missing".
func without(err error, consequence string) string {
	why := "not in this kernel"
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		why = "not permitted here"
	case err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) &&
		!errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.ENOSYS):
		why = "does not work here (" + err.Error() + ")"
	}
	return why + ": " + consequence
}
