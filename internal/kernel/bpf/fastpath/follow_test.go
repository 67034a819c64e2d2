package fastpath_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestFollow changes the ways to other nodes by what differs between plans: what is in the kernel then is what Set makes.
func TestFollow(t *testing.T) {
	n, _, _ := twoNodes(t, podnet.Direct, fastpath.Options{})
	via := func(to, via string) podnet.Remote {
		return podnet.Remote{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(via), Device: "eth0"}
	}
	from := n.plan
	follow := func(to fastpath.Plan, want string) {
		t.Helper()
		c, followed, err := n.path.Follow(from, to)
		testenv.Must(t, err)
		if !followed || c.String() != want {
			t.Errorf("followed %v: %v, want %s", followed, c, want)
		}
		if d, err := n.path.Check(to); err != nil || len(d) > 0 {
			t.Errorf("afterwards: %v, %v", d, err)
		}
		from = to
	}
	to := from
	to.Remotes = append(slices.Clone(from.Remotes), via("10.244.8.0/24", "192.0.2.8"), via("10.244.9.0/24", "192.0.2.9"), via("fd00:10:244:9::/64", "2001:db8::9"))
	follow(to, fastpath.Changes{Remotes: diff.Count{Added: 3}}.String())
	to.Remotes = append(slices.Clone(from.Remotes[:len(from.Remotes)-1]), via("fd00:10:244:9::/64", "2001:db8::7"))
	follow(to, fastpath.Changes{Remotes: diff.Count{Added: 1}}.String())
	to.Remotes = to.Remotes[:len(to.Remotes)-2]
	follow(to, fastpath.Changes{Remotes: diff.Count{Removed: 2}}.String())
	follow(to, fastpath.Changes{}.String())

	for what, change := range map[string]func(*fastpath.Plan){
		"devices":      func(p *fastpath.Plan) { p.Devices = append(slices.Clone(p.Devices), "lo") },
		"switched off": func(p *fastpath.Plan) { p.Fast = false },
		"pods": func(p *fastpath.Plan) {
			p.Slow = map[netip.Addr]pin.Stack{netip.MustParseAddr("10.244.1.2"): pin.Policy}
		},
		"pods that policies isolate": func(p *fastpath.Plan) { p.Free = map[netip.Addr]bool{} },
		"another device's": func(p *fastpath.Plan) {
			p.Remotes = append(slices.Clone(p.Remotes), podnet.Remote{To: netip.MustParsePrefix("10.244.5.0/24"), Via: netip.MustParseAddr("192.0.2.5"), Device: "none"})
		},
	} {
		to := from
		change(&to)
		if _, followed, _ := n.path.Follow(from, to); followed {
			t.Errorf("%s: was followed", what)
		}
	}
	if c := n.set(t); c.Remotes.Removed != 1 || c.Remotes.Added != 0 {
		t.Errorf("Set corrects %v", c)
	}
}
