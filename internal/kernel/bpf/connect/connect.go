// Package connect balances Services at connect(), before there is a packet. The kernel runs its programs when a process
// connects a socket or sends by one, and they replace a Service's address by an endpoint's: docs/design/connect.md.
//
// Programs and maps stay in the kernel when the process ends.
package connect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/kerneltypes"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Options says where a node balances Services at connect(). Cgroup is required.
type Options struct {
	Dir string // where it is pinned; pin.ServicesDir if empty
	// Cgroup is the directory of the node's cgroup v2. Sockets of the processes in and below it are translated.
	Cgroup string
	// Node is the node's network namespace, in which node ports answer at loopback addresses; the caller's if nil.
	Node *link.Namespace
}

// Translator balances Services at connect() on one node. Only one goroutine at a time may call Set, SetAfter and Change, and
// only one Holds; the two may differ. Any goroutine may call the other methods, which read.
type Translator struct {
	Options
	cgroup  uint64 // its id
	objects bpfObjects
	mu      sync.Mutex // guards state, and is held while the maps may differ from it
	state   *state     // what the maps hold; nil if that is unknown
}

// Open loads the programs and reuses the maps that are pinned. Nothing changes for sockets until Set. If the kernel lacks
// something that is required, the error is a *bpf.UnsupportedError.
func Open(o Options) (*Translator, error) {
	t := &Translator{Options: o}
	t.Dir = cmp.Or(t.Dir, pin.ServicesDir)
	var st unix.Stat_t
	if err := unix.Stat(t.Cgroup, &st); err != nil {
		return nil, fmt.Errorf("find the node's cgroup %s: %w", t.Cgroup, err)
	}
	t.cgroup = st.Ino
	if !isCgroup(t.Cgroup) {
		return nil, unsupported("cgroup v2 at " + t.Cgroup)
	}
	if err := bpf.MakeDir(t.Dir); err != nil {
		return nil, err
	}
	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("read the programs of connect(): %w", err)
	}
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) != nil {
		without(spec, asm.FnSetRetval) // refused sockets get EPERM, the kernel's default
	}
	types, err := kernelSockets()
	if err != nil || features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkcToTcpSock) != nil {
		without(spec, asm.FnSkcToTcpSock) // then no socket counts as the kernel's own
	}
	load := func() error {
		return spec.LoadAndAssign(&t.objects, &ebpf.CollectionOptions{
			Maps: ebpf.MapOptions{PinPath: t.Dir}, Programs: ebpf.ProgramOptions{KernelTypes: types},
		})
	}
	err = load()
	if errors.Is(err, unix.EPERM) {
		// Before Linux 5.11 maps count against the process's limit of locked memory, which is low by default.
		all := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &all) == nil {
			err = load()
		}
	}
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		// The maps are another version's. Its programs keep using them until Set replaces the programs.
		if err = unpinOthers(spec, t.Dir); err == nil {
			err = load()
		}
	}
	if err == nil {
		return t, nil
	}
	if lacks := missing(); len(lacks) > 0 {
		return nil, unsupported(lacks...)
	}
	var v *ebpf.VerifierError
	if errors.As(err, &v) {
		return nil, fmt.Errorf("load the programs of connect(): the kernel's verifier refuses them: %w", v)
	}
	return nil, fmt.Errorf("load the programs of connect(): %w", err)
}

// Close closes programs and maps. They stay pinned and keep working.
func (t *Translator) Close() { _ = t.objects.Close() }

// Remove detaches the programs and removes all pins. Connected sockets stay connected.
func Remove(dir string) error {
	dir = cmp.Or(dir, pin.ServicesDir)
	for _, h := range slices.Backward(hooks) {
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

// kernelSockets returns the types of the kernel by which the programs know its own sockets.
func kernelSockets() (*btf.Spec, error) {
	types, err := kerneltypes.Flag("sock", "sk_kern_sock")
	if err != nil {
		return btf.LoadKernelSpec()
	}
	return types, nil
}

// without replaces calls of a kernel function by the result 0, and drops relocations that read what it would have returned.
func without(spec *ebpf.CollectionSpec, fn asm.BuiltinFunc) {
	for _, p := range spec.Programs {
		for i, ins := range p.Instructions {
			switch {
			case ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == fn:
				p.Instructions[i] = asm.Mov.Imm(asm.R0, 0).WithMetadata(ins.Metadata)
			case fn == asm.FnSkcToTcpSock && btf.CORERelocationMetadata(&ins) != nil: // reads the result
				p.Instructions[i] = btf.WithCORERelocationMetadata(ins, nil)
			}
		}
	}
}

// unpinOthers unpins the maps whose layout differs from what the programs expect. The other maps stay, so that sockets which
// were connected earlier are still known. Maps that refer to each other are unpinned together.
func unpinOthers(spec *ebpf.CollectionSpec, dir string) error {
	var others []string
	for name, want := range spec.Maps {
		there, err := ebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err == nil {
			err = want.Compatible(there)
			there.Close()
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			others = append(others, name)
		}
	}
	together := []string{pin.Services, pin.Backends, pin.Node}
	if slices.ContainsFunc(together, func(name string) bool { return slices.Contains(others, name) }) {
		others = append(others, together...)
	}
	for _, name := range others {
		if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// unpinFormer removes maps of earlier versions that this one does not use.
func (t *Translator) unpinFormer() error {
	for _, name := range []string{"fathom_sends", "fathom_replies"} {
		if err := os.RemoveAll(filepath.Join(t.Dir, name)); err != nil {
			return fmt.Errorf("remove the map %s of an earlier version: %w", name, err)
		}
	}
	return nil
}

// Supported returns one line that says what the kernel lacks to balance at connect(), or "" if it lacks nothing.
func Supported() string {
	if lacks := missing(); len(lacks) > 0 {
		return unsupported(lacks...).Error()
	}
	return ""
}

func unsupported(missing ...string) *bpf.UnsupportedError {
	return &bpf.UnsupportedError{Missing: missing, Without: "no balancing of Services at connect()", Instead: "rules for packets do the same"}
}

func isCgroup(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.CGROUP2_SUPER_MAGIC
}

// missing lists what is required and the kernel lacks.
func missing() []string {
	var missing []string
	for _, h := range hooks {
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
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkStorageGet) != nil {
		missing = append(missing, "bpf_sk_storage_get at sockets' addresses (Linux 5.8)")
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}
