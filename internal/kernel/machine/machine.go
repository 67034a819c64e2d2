// Package machine runs machines made of namespaces: a process tree under its own init, in its own mount,
// PID, network, UTS, IPC and cgroup namespaces, with a root file system that overlays the host's. Ending
// the init ends the machine, as a power cut would. The package knows nothing of Kubernetes.
//
// A machine is found by its cgroup alone. No file records a process id, so none can be out of date.
package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
)

// Path is the search path of programs in a machine.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Machine is a running machine.
type Machine struct {
	Cgroup string
	Pid    int // of its init, as the host sees it
}

// ErrNotRunning says that a machine has no init process.
var ErrNotRunning = errors.New("the machine is not running")

// Prepare makes the directories of a machine's disk, so that files can be laid in upper before it starts.
// The hidden directories are the machine's own: what the host has there does not show through.
func (s Spec) Prepare(hidden ...string) error {
	for _, dir := range hidden {
		path := filepath.Join(s.Dir, "upper", dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return fmt.Errorf("make the disk of machine %s: %w", s.Hostname, err)
		}
		// Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
		if err := unix.Setxattr(path, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			return fmt.Errorf("make the disk of machine %s: hide the host's /%s: %w", s.Hostname, dir, err)
		}
	}
	for _, dir := range []string{"upper", "work", "root", "var"} {
		if err := os.MkdirAll(filepath.Join(s.Dir, dir), 0o755); err != nil {
			return fmt.Errorf("make the disk of machine %s: %w", s.Hostname, err)
		}
	}
	return nil
}

// Start boots the machine with the init program and returns when its services are being started. Its
// network namespace holds lo alone: the caller plugs the wires. Start fails if the machine runs already.
func Start(ctx context.Context, init string, spec Spec) (*Machine, error) {
	if _, err := Open(spec.Cgroup); err == nil {
		return nil, fmt.Errorf("start machine %s: it is running", spec.Hostname)
	}
	if err := spec.Prepare(); err != nil {
		return nil, err
	}
	if err := cgroup.Create(spec.Cgroup); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.Hostname, err)
	}
	m, err := start(ctx, init, spec)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.Hostname, err)
	}
	return m, nil
}

// weigh sets the processor weights. It comes after the init has started: in cgroup v2 no group can be made below
// one with processes, and the init has left the machine's own by now (cgroup.Nest).
func (s Spec) weigh() error {
	for _, w := range s.CPUWeights {
		group := filepath.Join(s.Cgroup, w.Group)
		if err := cgroup.Create(group); err != nil {
			return err
		}
		if err := cgroup.SetCPUWeight(group, w.Times); err != nil {
			return err
		}
	}
	return nil
}

func start(ctx context.Context, init string, spec Spec) (*Machine, error) {
	body, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(spec.Dir, "init.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	specRead, specWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer specRead.Close()
	defer specWrite.Close()
	readyRead, readyWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer readyRead.Close()
	defer readyWrite.Close()

	attr := &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
			unix.CLONE_NEWNET,
	}
	group, err := cgroup.Open(spec.Cgroup)
	if err != nil {
		return nil, err
	}
	if group != nil { // born in its cgroup: at no moment is it a process that nobody can find
		defer group.Close()
		attr.UseCgroupFD, attr.CgroupFD = true, int(group.Fd())
	}
	p, err := os.StartProcess(init, []string{"fathom-init"}, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=" + Path}, Sys: attr,
		Files: []*os.File{null, log, log, SpecFD: specRead, ReadyFD: readyWrite},
	})
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", init, err)
	}
	// Collect the init if it ends while this process lives, so that no zombie stays.
	go func() { _, _ = p.Wait() }()
	readyWrite.Close()
	specRead.Close()
	// Nobody reads when init has ended by now: that is told below, with where to look.
	if _, err := specWrite.Write(body); err != nil && !errors.Is(err, unix.EPIPE) {
		_ = p.Kill()
		return nil, err
	}
	specWrite.Close()

	stop := context.AfterFunc(ctx, func() { readyRead.Close() })
	defer stop()
	line, err := bufio.NewReader(io.LimitReader(readyRead, 64<<10)).ReadString('\n')
	if line = strings.TrimSpace(line); line == "ok" {
		if err := spec.weigh(); err != nil {
			_ = cgroup.Kill(ctx, spec.Cgroup)
			return nil, err
		}
		return &Machine{Cgroup: spec.Cgroup, Pid: p.Pid}, nil
	}
	_ = p.Kill()
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case line != "":
		return nil, errors.New(line)
	}
	return nil, fmt.Errorf("its init ended before it was ready, see %s: %w", filepath.Join(spec.Dir, "init.log"), err)
}

// Open finds a running machine by its cgroup. The error is ErrNotRunning when there is none.
func Open(group string) (*Machine, error) {
	pids, err := cgroup.Procs(group)
	if err != nil {
		return nil, err
	}
	slices.Sort(pids)
	for _, pid := range pids {
		if isInit(pid) {
			return &Machine{Cgroup: group, Pid: pid}, nil
		}
	}
	return nil, fmt.Errorf("%s: %w", filepath.Base(group), ErrNotRunning)
}

// isInit says whether pid is the first process of a PID namespace right below ours. Containers' first
// processes are one namespace further down.
func isInit(pid int) bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		if rest, found := strings.CutPrefix(line, "NSpid:"); found {
			f := strings.Fields(rest)
			return len(f) == 2 && f[1] == "1"
		}
		if strings.HasPrefix(line, "State:\tZ") {
			return false
		}
	}
	return false
}

// File returns where the host finds path of the machine.
func (m *Machine) File(path string) string {
	return filepath.Join("/proc", strconv.Itoa(m.Pid), "root", path)
}

// NetNS returns the path of the machine's network namespace.
func (m *Machine) NetNS() string { return fmt.Sprintf("/proc/%d/ns/net", m.Pid) }

// Control sends one request to the machine's init and returns its answer. The answer's error, if any, is
// returned as an error.
func (m *Machine) Control(ctx context.Context, req Request) (Response, error) {
	resp, err := m.control(ctx, req)
	if err == nil && resp.Error != "" {
		err = errors.New(resp.Error)
	}
	if err != nil {
		return resp, fmt.Errorf("%s %s on %s: %w", req.Op, req.Service, filepath.Base(m.Cgroup), err)
	}
	return resp, nil
}

func (m *Machine) control(ctx context.Context, req Request) (Response, error) {
	var resp Response
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", m.File(ControlSocket))
	if err != nil {
		return resp, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(c).Encode(req); err != nil {
		return resp, err
	}
	resp, err = DecodeResponse(c)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return resp, err
}

// PowerOff ends the machine cleanly: its processes are asked to end first. It returns when none is left.
func (m *Machine) PowerOff(ctx context.Context) error {
	fd, err := unix.PidfdOpen(m.Pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return err
	}
	defer unix.Close(fd)
	if _, err := m.Control(ctx, Request{Op: OpPowerOff}); err != nil {
		return err
	}
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return cgroup.Kill(ctx, m.Cgroup)
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return fmt.Errorf("power off %s: %w", filepath.Base(m.Cgroup), ctx.Err())
}

// Kill ends the machine at once, as a power cut does, and returns when no process is left.
func Kill(ctx context.Context, group string) error { return cgroup.Kill(ctx, group) }
