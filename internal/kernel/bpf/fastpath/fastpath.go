// Package fastpath is the fast path of pods' packets. The kernel runs two small programs: one where a packet leaves a pod,
// and one where a packet arrives from another node. They drop packets whose source is not the pod's own address, and
// redirect those packets that nothing else on the node needs to see. docs/design/fastpath.md says which these are.
//
// Programs and maps stay in the kernel when the process ends.
package fastpath

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Options configures a node's fast path. The zero value is a node's usual configuration.
type Options struct {
	Dir string // where it is pinned; pin.Dir if empty
	// NothingTranslates says that no rule on the node translates addresses of packets between pods. A kernel whose
	// connection tracking cannot be queried has a fast path only if this is set.
	NothingTranslates bool
	// NoTCX attaches by clsact, as on kernels before 6.6.
	NoTCX bool
}

// Plan is the desired state of the fast path. The pods are not part of it: they are read from the kernel.
type Plan struct {
	// Fast makes the programs redirect packets. Without it they only drop false sources.
	Fast bool
	podnet.Ways
	// Slow maps the addresses of pods whose packets take the stack to the reasons.
	Slow map[netip.Addr]pin.Stack
	// Free, unless it is nil, are the pods' addresses that no policy isolates. Of all others policies are asked (Policies), also of those
	// that come after the plan was made.
	Free map[netip.Addr]bool
}

// Path is the fast path of one node.
type Path struct {
	Options
	Support Support
	node    *link.Namespace
	objects bpfObjects
	judge   *Policies
}

// Open loads the programs and reuses the maps that are pinned. Nothing changes for packets until Set. If the kernel lacks
// something that is required, the error is a *bpf.UnsupportedError.
func Open(node *link.Namespace, o Options) (*Path, error) {
	p := &Path{Options: o, node: node}
	p.Dir = cmp.Or(p.Dir, pin.Dir)
	types := btf.NewCache() // shared with the loader
	p.Support = supported(node, types)
	if len(p.Support.Missing) > 0 {
		return nil, p.Support.unsupported()
	}
	p.Support.TCX = p.Support.TCX && !o.NoTCX
	if err := bpf.MakeDir(p.Dir); err != nil {
		return nil, err
	}
	spec, err := loadBpf()
	if err != nil {
		return nil, fmt.Errorf("read the fast path's programs: %w", err)
	}
	load := func() error {
		return spec.LoadAndAssign(&p.objects, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: p.Dir}, Cache: types})
	}
	err = load()
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		// The maps are another version's. Its programs keep using them until Set replaces the programs.
		err = nil
		for _, name := range []string{pin.Pods, pin.Ports, pin.Remotes, pin.Counts, pin.Identities, pin.Allowed, pin.Blocks, pin.Flows, pin.Judge} {
			err = errors.Join(err, os.RemoveAll(filepath.Join(p.Dir, name)))
		}
		if err == nil {
			err = load()
		}
	}
	if err != nil {
		var v *ebpf.VerifierError
		if errors.As(err, &v) {
			return nil, fmt.Errorf("load the fast path: the kernel's verifier refuses it: %w", v)
		}
		return nil, fmt.Errorf("load the fast path: %w", err)
	}
	p.judge = &Policies{maps: &p.objects.bpfMaps}
	if err := p.keepOrPin(pin.FromPod, &p.objects.FathomPod); err != nil {
		p.Close()
		return nil, err
	}
	if err := p.keepOrPin(pin.FromNet, &p.objects.FathomWire); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// Policies are the maps by which the path judges connections of pods that policies isolate.
func (p *Path) Policies() *Policies { return p.judge }

// Close closes programs and maps. They stay pinned and keep working.
func (p *Path) Close() { _ = p.objects.Close() }

// Fast reports whether the fast path can redirect packets, beyond dropping false sources, and if not, why.
func (p *Path) Fast() (bool, string) {
	if p.Support.Conntrack || p.NothingTranslates {
		return true, ""
	}
	return false, "this kernel's connection tracking cannot be queried (bpf_skb_ct_lookup, Linux 6.1 with CONFIG_DEBUG_INFO_BTF and nf_conntrack): " +
		"the fast path could not recognise packets of Services"
}

// keepOrPin pins a program. A pinned one stays if it is the same and uses the same maps.
func (p *Path) keepOrPin(name string, program **ebpf.Program) error {
	path := filepath.Join(p.Dir, name)
	if there, err := ebpf.LoadPinnedProgram(path, nil); err == nil {
		if same, err := bpf.IsSame(there, *program); err == nil && same {
			(*program).Close()
			*program = there
			return nil
		}
		there.Close()
	}
	// Pinned under another name first, so that the plugin always finds one or the other.
	next := path + "_next"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pin the program %s: %w", name, err)
	}
	err := (*program).Pin(next)
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return fmt.Errorf("pin the program %s: %w", name, err)
	}
	return nil
}

// Remove removes the fast path from a node: programs from devices, then all pins.
func Remove(node *link.Namespace, dir string) error {
	dir = cmp.Or(dir, pin.Dir)
	var errs []error
	// First all programs pass every packet to the stack, so that no connection is seen by only half of them.
	if pods, err := ebpf.LoadPinnedMap(filepath.Join(dir, pin.Pods), nil); err == nil {
		errs = append(errs, slowDown(pods))
		pods.Close()
	}
	names, err := node.Names()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	tcx := hasTCX(node)
	for index := range names {
		for _, name := range []string{pin.FromPod, pin.FromNet} {
			errs = append(errs, detach(node, tcx, index, name))
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		errs = append(errs, fmt.Errorf("remove what is pinned in %s: %w", dir, err))
	}
	return errors.Join(errs...)
}

func slowDown(pods *ebpf.Map) error {
	var key pin.Key
	var pod pin.Pod
	all := map[pin.Key]pin.Pod{}
	for i := pods.Iterate(); i.Next(&key, &pod); {
		all[key] = pod
	}
	var errs []error
	for key, pod := range all {
		pod.Stack |= pin.Off
		if err := pods.Update(key, pod, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
