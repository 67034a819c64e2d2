package connect

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// hook is where one of the programs is attached. Its link is pinned under the program's name. Rejected: attachment without
// a link, which also outlives the agent, but can only be found by the program's name.
type hook struct {
	name    string
	attach  ebpf.AttachType
	program func(*bpfObjects) *ebpf.Program
	needs   string
}

// hooks lists the programs in the order of attachment: a program that translates back comes before the one that translates.
// They are detached in reverse order.
var hooks = []hook{
	{pin.Release, ebpf.AttachCgroupInetSockRelease, func(o *bpfObjects) *ebpf.Program { return o.FathomRelease }, "cgroup/sock_release (Linux 5.9)"},
	{pin.Getpeer4, ebpf.AttachCgroupInet4GetPeername, func(o *bpfObjects) *ebpf.Program { return o.FathomGetpeer4 }, "cgroup/getpeername (Linux 5.8)"},
	{pin.Getpeer6, ebpf.AttachCgroupInet6GetPeername, func(o *bpfObjects) *ebpf.Program { return o.FathomGetpeer6 }, "cgroup/getpeername (Linux 5.8)"},
	{pin.Recvmsg4, ebpf.AttachCGroupUDP4Recvmsg, func(o *bpfObjects) *ebpf.Program { return o.FathomRecvmsg4 }, "cgroup/recvmsg (Linux 5.2)"},
	{pin.Recvmsg6, ebpf.AttachCGroupUDP6Recvmsg, func(o *bpfObjects) *ebpf.Program { return o.FathomRecvmsg6 }, "cgroup/recvmsg (Linux 5.2)"},
	{pin.Sendmsg4, ebpf.AttachCGroupUDP4Sendmsg, func(o *bpfObjects) *ebpf.Program { return o.FathomSendmsg4 }, "cgroup/sendmsg (Linux 4.18)"},
	{pin.Sendmsg6, ebpf.AttachCGroupUDP6Sendmsg, func(o *bpfObjects) *ebpf.Program { return o.FathomSendmsg6 }, "cgroup/sendmsg (Linux 4.18)"},
	{pin.Connect4, ebpf.AttachCGroupInet4Connect, func(o *bpfObjects) *ebpf.Program { return o.FathomConnect4 }, "cgroup/connect (Linux 4.17 with CONFIG_CGROUP_BPF)"},
	{pin.Connect6, ebpf.AttachCGroupInet6Connect, func(o *bpfObjects) *ebpf.Program { return o.FathomConnect6 }, "cgroup/connect (Linux 4.17 with CONFIG_CGROUP_BPF)"},
}

// attach attaches every program to the cgroup exactly once, and counts those that were missing or another version's.
func (t *Translator) attach() (diff.Count, error) {
	var count diff.Count
	var errs []error
	for _, h := range hooks {
		if err := t.attachOne(h, &count); err != nil {
			errs = append(errs, fmt.Errorf("attach the program %s to %s: %w", h.name, t.Cgroup, err))
		}
	}
	return count, errors.Join(errs...)
}

func (t *Translator) attachOne(h hook, count *diff.Count) error {
	path := filepath.Join(t.Dir, h.name)
	next := path + "_next"
	// Left by an agent that was killed before the rename. Two links would translate twice.
	if err := detachPinned(next); err != nil {
		return err
	}
	program := h.program(&t.objects)
	there, err := ebpflink.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		next = path
		count.Added++
	} else {
		count.Corrected++ // undone below if the link is right
	}
	if err == nil {
		defer there.Close()
		here, same := t.isAttached(there, program)
		if here && same {
			count.Corrected--
			return nil
		}
		if here {
			return there.Update(program)
		}
	}
	// The pinned link is on another cgroup, or on a deleted one.
	l, err := ebpflink.AttachCgroup(ebpflink.CgroupOptions{Path: t.Cgroup, Attach: h.attach, Program: program})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Pin(next); err != nil || next == path {
		return err
	}
	return os.Rename(next, path)
}

const thisVersion = "this version"

// detachPinned detaches a link and removes its pin. Unpinning alone detaches too, but only some time later.
func detachPinned(path string) error {
	l, err := ebpflink.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.Close()
	if err := l.Detach(); err != nil {
		return err
	}
	return os.Remove(path)
}

// attached returns the state of each program that is attached, by name: thisVersion, or what is wrong.
func (t *Translator) attached() (map[string]string, error) {
	all := map[string]string{}
	for _, h := range hooks {
		l, err := ebpflink.LoadPinnedLink(filepath.Join(t.Dir, h.name), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask for the program %s: %w", h.name, err)
		}
		here, same := t.isAttached(l, h.program(&t.objects))
		l.Close()
		switch {
		case here && same:
			all[h.name] = thisVersion
		case here:
			all[h.name] = "another version"
		default:
			all[h.name] = "on another cgroup"
		}
	}
	return all, nil
}

// isAttached reports whether a link is on the cgroup (here), and whether its program is the given one (same).
func (t *Translator) isAttached(l ebpflink.Link, program *ebpf.Program) (here, same bool) {
	info, err := l.Info()
	if err != nil || info.Cgroup() == nil || info.Cgroup().CgroupId != t.cgroup {
		return false, false
	}
	there, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return true, false
	}
	defer there.Close()
	same, err = bpf.IsSame(there, program)
	return true, err == nil && same
}

// setNode writes into the map pin.Node which network namespace is the node's own. Before Linux 5.14 its cookie cannot be read,
// and NodePorts do not answer at loopback addresses.
func (t *Translator) setNode() (changed bool, err error) {
	cookie, err := t.nodeCookie()
	if err != nil {
		return false, err
	}
	var have uint64
	if err := t.objects.FathomNode.Lookup(nodeNetns, &have); err == nil && have == cookie {
		return false, nil
	}
	if err := t.objects.FathomNode.Update(nodeNetns, cookie, ebpf.UpdateAny); err != nil {
		return false, fmt.Errorf("write the map %s: %w", pin.Node, err)
	}
	return true, nil
}

// nodeCookie returns the cookie of the node's network namespace, or 0 if the kernel does not tell it.
func (t *Translator) nodeCookie() (uint64, error) { return NetnsCookie(t.Node) }

// NetnsCookie returns the number by which the programs know a network namespace, or the caller's own if n is nil. It is 0
// before Linux 5.14, whose kernels do not tell it.
func NetnsCookie(n *link.Namespace) (cookie uint64, err error) {
	ask := func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("ask for the cookie of a network namespace: %w", err)
		}
		defer unix.Close(fd)
		if cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
			cookie = 0
		}
		return nil
	}
	if n == nil {
		err = ask()
	} else {
		err = n.Do(ask)
	}
	return cookie, err
}
