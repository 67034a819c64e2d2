package doctor

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The oldest supported kernel: 5.14 has cgroup.kill, which kills all processes of a node.
const (
	oldestMajor = 5
	oldestMinor = 14
)

func (e *exam) kernel(context.Context) {
	e.version(e.host.release)
	e.clock(e.kitTime())
	if e.Quick {
		return
	}
	if e.host.exists("/sys/kernel/btf/vmlinux") {
		e.ok(kernel, "BTF", "/sys/kernel/btf/vmlinux")
	} else {
		e.warn(kernel, "BTF", "no /sys/kernel/btf/vmlinux: eBPF programs that read kernel structures do not load", "use a kernel with CONFIG_DEBUG_INFO_BTF")
	}
	if err := tryBPF(); err != nil {
		e.warn(kernel, "eBPF", without(err, "a network of your own that uses eBPF does not work"), "use a kernel with CONFIG_BPF_SYSCALL, as root")
	} else {
		e.ok(kernel, "eBPF", "maps can be created")
	}
	e.socket("SCTP", "sctp", unix.SOCK_STREAM, unix.IPPROTO_SCTP, "pods cannot use SCTP")
}

// version compares the release with the oldest one that a lab runs on.
func (e *exam) version(release string) {
	major, rest, _ := strings.Cut(release, ".")
	minor := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		minor = rest[:i]
	}
	a, errA := strconv.Atoi(major)
	b, errB := strconv.Atoi(minor)
	switch {
	case errA != nil || errB != nil:
		e.warn(kernel, "version", fmt.Sprintf("%q is not understood; a lab needs %d.%d or later", release, oldestMajor, oldestMinor), "")
	case a < oldestMajor || a == oldestMajor && b < oldestMinor:
		e.fail(kernel, "version", fmt.Sprintf("Linux %s; a lab needs %d.%d or later", release, oldestMajor, oldestMinor), "upgrade the kernel")
	default:
		e.have(true, kernel, "version", "Linux "+release)
	}
}

// clock detects a clock that was never set: once it is set, every certificate of the lab would be outside of its validity.
func (e *exam) clock(built int64) {
	if e.now.Year() < 2025 || built > 0 && e.now.Unix() < built-24*3600 {
		e.fail(kernel, "clock", "the clock says "+e.now.UTC().Format("2006-01-02 15:04")+" UTC, which is before the kit was built",
			"set the clock: date -s, or start a time service")
		return
	}
	e.have(true, kernel, "clock", e.now.UTC().Format("2006-01-02 15:04")+" UTC")
}

// socket reports whether sockets of a protocol can be created.
func (e *exam) socket(name, module string, kind, protocol int, consequence string) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		e.warn(kernel, name, without(err, consequence), e.host.kernelRemedy(module))
		return
	}
	unix.Close(fd)
	e.ok(kernel, name, "sockets can be created")
}

// tryBPF creates an array map with one entry and closes it. It makes the system call directly: a library that loads eBPF
// programs is more than this needs.
func tryBPF() error {
	attr := struct{ mapType, keySize, valueSize, maxEntries uint32 }{unix.BPF_MAP_TYPE_ARRAY, 4, 4, 1}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return os.NewSyscallError("bpf", errno)
	}
	return unix.Close(int(fd))
}
