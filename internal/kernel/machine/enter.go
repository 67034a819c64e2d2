package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
)

// entered are the namespaces that a thread joins to run a command in a machine, in this order: the mount
// namespace last, since the others are opened by path before it changes. The cgroup namespace is not among
// them: see EnterCommand.
var entered = []struct {
	name string
	flag int
}{
	{"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC},
	{"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
}

// The main goroutine keeps the main thread, from before main on. A goroutine that enters a machine ends
// with its thread, and the main thread cannot end: it would stay in the machine, and with it all that the
// kernel shows of this process in /proc/self.
func init() { runtime.LockOSThread() }

// EnterCommand is the hidden command of fathom-init that joins the machine's cgroup namespace and its groups of cgroup
// v1, which clone knows nothing of, and becomes the program of its arguments: PATH ARGV0 ARGS…
//
// A process can be born in a cgroup only if the namespace of its parent shows both that cgroup and the parent's own:
// where systemd mounts cgroup v2 (with nsdelegate), clone says ENOENT otherwise. So it is born with the host's
// cgroup namespace, and changes that itself.
const EnterCommand = "enter"

// Run runs cmd in the machine and waits for it, as exec.Cmd.Run does. cmd.Path must be a path in the
// machine or a bare name, which is then looked for on the machine's Path. Environment and directory are
// the machine's unless set. When ctx ends the command is killed.
func (m *Machine) Run(ctx context.Context, cmd *exec.Cmd) error {
	if cmd.Env == nil {
		cmd.Env = []string{"PATH=" + Path, "HOME=/root", "LANG=C.UTF-8"}
		if term := os.Getenv("TERM"); term != "" {
			cmd.Env = append(cmd.Env, "TERM="+term)
		}
	}
	if cmd.Dir == "" {
		cmd.Dir = "/"
	}
	started := make(chan error)
	name := filepath.Base(cmd.Path)
	go func() {
		// The thread's namespaces are changed for good: it stays locked, and so ends with the goroutine.
		runtime.LockOSThread()
		started <- m.startInside(cmd)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("run %s on %s: %w", name, filepath.Base(m.Cgroup), err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer stop()
	err := cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// Output runs args in the machine and returns what it printed. An error holds what it said on stderr.
func (m *Machine) Output(ctx context.Context, args ...string) (string, error) {
	var out, errOut strings.Builder
	cmd := Command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := m.Run(ctx, cmd); err != nil {
		return out.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errOut.String()))
	}
	return out.String(), nil
}

// Command makes a command for Run. exec.Command would look the name up on the host.
func Command(args ...string) *exec.Cmd { return &exec.Cmd{Path: args[0], Args: args} }

func (m *Machine) startInside(cmd *exec.Cmd) error {
	group, err := cgroup.Open(v2Group(m.Cgroup))
	if err != nil {
		return err
	}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if group != nil {
		defer group.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	var fds []int
	for _, ns := range entered {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", m.Pid, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			return ErrNotRunning
		}
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	// A thread that shares its root and directory with others cannot change its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the file system state: %w", err)
	}
	for i, ns := range entered {
		if err := unix.Setns(fds[i], ns.flag); err != nil {
			return fmt.Errorf("enter the %s namespace: %w", ns.name, err)
		}
	}
	if !strings.Contains(cmd.Path, "/") {
		path, err := lookPath(cmd.Path)
		if err != nil {
			return err
		}
		cmd.Path = path
	} else if filepath.IsAbs(cmd.Path) {
		if _, err := os.Stat(cmd.Path); err != nil {
			return err
		}
	}
	cmd.Args = append([]string{"fathom-init", EnterCommand, cmd.Path}, cmd.Args...)
	cmd.Path = "/proc/1/exe" // whatever became of the file that init was started from
	return cmd.Start()
}

// v2Group returns the group that init lives in: see boot.joinCgroup.
func v2Group(group string) string {
	if _, mode, err := cgroup.Hierarchies(); err == nil && mode == cgroup.V2 {
		return filepath.Join(group, "init")
	}
	return group
}

func lookPath(name string) (string, error) {
	for dir := range strings.SplitSeq(Path, ":") {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: not found in %s: %w", name, Path, exec.ErrNotFound)
}
