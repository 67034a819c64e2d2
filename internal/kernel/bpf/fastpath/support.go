package fastpath

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	ebpflink "github.com/cilium/ebpf/link"

	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Support is what the kernel offers to the fast path.
type Support struct {
	TCX       bool     // Linux 6.6; without it clsact
	Conntrack bool     // Linux 6.1 with BTF; without it only if nothing translates addresses
	Missing   []string // what is required and missing
}

// Supported returns one line that says what the kernel lacks, or "" if it lacks nothing.
func Supported() string {
	n, err := link.Here()
	if err != nil {
		return err.Error()
	}
	defer n.Close()
	return supported(n, btf.NewCache()).String()
}

func (s Support) String() string {
	switch {
	case len(s.Missing) > 0:
		return s.unsupported().Error()
	case !s.Conntrack:
		return "no fast path while something translates addresses: this kernel has no bpf_skb_ct_lookup (Linux 6.1 with BTF, and nf_conntrack loaded)"
	case !s.TCX:
		return "the fast path uses clsact: this kernel has no tcx (Linux 6.6)"
	}
	return ""
}

// unsupported is the error of a kernel that lacks something required.
func (s Support) unsupported() *bpf.UnsupportedError {
	return &bpf.UnsupportedError{Without: "no fast path", Missing: s.Missing, Instead: "plain routing does the same"}
}

// supported probes the kernel, and reads its types into the cache, which takes 15 ms.
func supported(n *link.Namespace, types *btf.Cache) Support {
	var s Support
	for _, h := range []struct {
		fn   asm.BuiltinFunc
		what string
	}{
		{asm.FnRedirectPeer, "bpf_redirect_peer (Linux 5.10)"},
		{asm.FnRedirectNeigh, "bpf_redirect_neigh (Linux 5.10)"},
		{asm.FnCheckMtu, "bpf_check_mtu (Linux 5.12)"},
	} {
		if features.HaveProgramHelper(ebpf.SchedCLS, h.fn) != nil {
			s.Missing = append(s.Missing, h.what)
		}
	}
	s.TCX = hasTCX(n)
	s.Conntrack = hasKfuncs(types, "bpf_skb_ct_lookup", "bpf_ct_release")
	return s
}

func hasTCX(n *link.Namespace) bool {
	return n.Do(func() error {
		_, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress}) // lo
		return err
	}) == nil
}

// hasKfuncs looks for functions in the types of the kernel, and of conntrack where that is a module.
func hasKfuncs(types *btf.Cache, names ...string) bool {
	has := func(spec *btf.Spec, err error) func(string) bool {
		return func(name string) bool {
			var f *btf.Func
			return err == nil && spec.TypeByName(name, &f) == nil
		}
	}
	inKernel := has(types.Kernel())
	for _, name := range names {
		if !inKernel(name) && !has(types.Module("nf_conntrack"))(name) {
			return false
		}
	}
	return true
}
