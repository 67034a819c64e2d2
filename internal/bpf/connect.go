package bpf

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/bpf/pin"
	"github.com/fathom-network/fathom/internal/link"
)

// ConnectOptions are how a node balances Services at connect(). Cgroup must be given.
type ConnectOptions struct {
	Dir string // where it is pinned; pin.ServicesDir if empty
	// Cgroup is the directory of the node's cgroup v2: sockets that processes in and below it make meet Services.
	Cgroup string
	// Node is the node's network namespace, in which node ports answer at loopback addresses; the caller's if nil.
	Node *link.Namespace
}

// Connect is the balancing of Services at connect() on one node: docs/design/connect.md. Set and Change are for one
// goroutine at a time, and Holds for another; what else reads may be called by any.
type Connect struct {
	ConnectOptions
	cgroup  uint64 // its id
	objects connectObjects
	mu      sync.Mutex    // of state, and held while what it says of the maps may not be so
	state   *connectState // what the maps hold; nil if that is not certain
}

// OpenConnect loads the programs and finds the maps that are pinned already. Nothing changes for sockets until Set. A
// kernel that lacks what cannot be done without is an *UnsupportedError.
func OpenConnect(o ConnectOptions) (*Connect, error) {
	c := &Connect{ConnectOptions: o}
	c.Dir = cmp.Or(c.Dir, pin.ServicesDir)
	var st unix.Stat_t
	if err := unix.Stat(c.Cgroup, &st); err != nil {
		return nil, fmt.Errorf("find the node's cgroup %s: %w", c.Cgroup, err)
	}
	c.cgroup = st.Ino
	if !isCgroup(c.Cgroup) {
		return nil, connectUnsupported("cgroup v2 at " + c.Cgroup)
	}
	if err := makeDir(c.Dir); err != nil {
		return nil, err
	}
	spec, err := loadConnect()
	if err != nil {
		return nil, fmt.Errorf("read the programs of connect(): %w", err)
	}
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) != nil {
		withoutSetRetval(spec)
	}
	load := func() error {
		return spec.LoadAndAssign(&c.objects, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: c.Dir}})
	}
	err = load()
	if errors.Is(err, unix.EPERM) {
		// Before Linux 5.11 maps count as locked memory of the process, of which there is little.
		all := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &all) == nil {
			err = load()
		}
	}
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		// Of another version. Its programs go on with their maps until Set replaces them.
		err = nil
		for name := range spec.Maps {
			err = errors.Join(err, os.RemoveAll(filepath.Join(c.Dir, name)))
		}
		if err == nil {
			err = load()
		}
	}
	if err == nil {
		return c, nil
	}
	if missing := missingForConnect(); len(missing) > 0 {
		return nil, connectUnsupported(missing...)
	}
	var v *ebpf.VerifierError
	if errors.As(err, &v) {
		return nil, fmt.Errorf("load the programs of connect(): the kernel's verifier refuses them: %w", v)
	}
	return nil, fmt.Errorf("load the programs of connect(): %w", err)
}

// Close lets go of programs and maps. They stay where they are, and go on.
func (c *Connect) Close() { _ = c.objects.Close() }

// RemoveConnect takes away all that balances at connect() on a node. Sockets that are connected stay so.
func RemoveConnect(dir string) error {
	dir = cmp.Or(dir, pin.ServicesDir)
	for _, h := range slices.Backward(connectHooks) {
		for _, name := range []string{h.name, h.name + "_next"} {
			if err := detachPinned(filepath.Join(dir, name)); err != nil {
				return fmt.Errorf("detach the program %s: %w", h.name, err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove what is pinned in %s: %w", dir, err)
	}
	return nil
}

// withoutSetRetval has refused sockets see EPERM: what the kernel says for a program that says no.
func withoutSetRetval(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		for i, ins := range p.Instructions {
			if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnSetRetval {
				p.Instructions[i] = asm.Mov.Imm(asm.R0, 0).WithMetadata(ins.Metadata)
			}
		}
	}
}

// ConnectSupported says in one line what the kernel lacks to balance at connect(), or nothing.
func ConnectSupported() string {
	if missing := missingForConnect(); len(missing) > 0 {
		return connectUnsupported(missing...).Error()
	}
	return ""
}

func connectUnsupported(missing ...string) *UnsupportedError {
	return &UnsupportedError{Support: Support{Missing: missing}, without: "no balancing of Services at connect()", instead: "rules for packets do the same"}
}

func isCgroup(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

func missingForConnect() []string {
	var missing []string
	for _, h := range connectHooks {
		kind := ebpf.CGroupSockAddr
		if h.attach == ebpf.AttachCgroupInetSockRelease {
			kind = ebpf.CGroupSock
		}
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: kind, AttachType: h.attach, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}})
		if err != nil {
			missing = append(missing, h.needs)
			continue
		}
		p.Close()
	}
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie) != nil {
		missing = append(missing, "bpf_get_netns_cookie (Linux 5.7)")
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}
