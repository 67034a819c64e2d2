// Package connect is the balancing of Services at connect(), before there is a packet: programs that the kernel runs when a
// process connects a socket, or sends by one, put an endpoint's address in the place of a Service's. docs/design/connect.md
// says how.
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

// Options are how a node balances Services at connect(). Cgroup must be given.
type Options struct {
	Dir string // where it is pinned; pin.ServicesDir if empty
	// Cgroup is the directory of the node's cgroup v2: sockets that processes in and below it make meet Services.
	Cgroup string
	// Node is the node's network namespace, in which node ports answer at loopback addresses; the caller's if nil.
	Node *link.Namespace
}

// Translator is the balancing of Services at connect() on one node: docs/design/connect.md. Set and Change are for one
// goroutine at a time, and Holds for another; what else reads may be called by any.
type Translator struct {
	Options
	cgroup  uint64 // its id
	objects bpfObjects
	mu      sync.Mutex // of state, and held while what it says of the maps may not be so
	state   *state     // what the maps hold; nil if that is not certain
}

// Open loads the programs and finds the maps that are pinned already. Nothing changes for sockets until Set. A
// kernel that lacks what cannot be done without is an *bpf.UnsupportedError.
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
		without(spec, asm.FnSetRetval) // refused sockets see EPERM: what the kernel says for a program that says no
	}
	types, err := kernelSockets()
	if err != nil || features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSkcToTcpSock) != nil {
		without(spec, asm.FnSkcToTcpSock) // no socket is taken for the kernel's own
	}
	load := func() error {
		return spec.LoadAndAssign(&t.objects, &ebpf.CollectionOptions{
			Maps: ebpf.MapOptions{PinPath: t.Dir}, Programs: ebpf.ProgramOptions{KernelTypes: types},
		})
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

// Close lets go of programs and maps. They stay where they are, and go on.
func (t *Translator) Close() { _ = t.objects.Close() }

// Remove takes away all that balances at connect() on a node. Sockets that are connected stay so.
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

// without has the programs go on as if a function of the kernel's had returned 0, and reads nothing of the kernel's types.
func without(spec *ebpf.CollectionSpec, fn asm.BuiltinFunc) {
	for _, p := range spec.Programs {
		for i, ins := range p.Instructions {
			switch {
			case ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == fn:
				p.Instructions[i] = asm.Mov.Imm(asm.R0, 0).WithMetadata(ins.Metadata)
			case fn == asm.FnSkcToTcpSock && btf.CORERelocationMetadata(&ins) != nil: // of what it returned
				p.Instructions[i] = btf.WithCORERelocationMetadata(ins, nil)
			}
		}
	}
}

// unpinOthers has the maps give way that are not of the shape that the programs want. Others stay, so that sockets which
// were connected before are known; but those that tell of one another go together.
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

// unpinFormer lets go of what earlier versions had, and nothing uses any more.
func (t *Translator) unpinFormer() error {
	for _, name := range []string{"fathom_sends", "fathom_replies"} {
		if err := os.RemoveAll(filepath.Join(t.Dir, name)); err != nil {
			return fmt.Errorf("remove the map %s of an earlier version: %w", name, err)
		}
	}
	return nil
}

// Supported says in one line what the kernel lacks to balance at connect(), or nothing.
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

// missing lists what there is no doing without, and the kernel lacks.
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
