package podnet_test

import (
	"testing"

	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// While a cluster changes from direct routes to vxlan, a node sends by vxlan only to who receives it already.
func TestTunnelDown(t *testing.T) {
	late, far := b, c
	late.TunnelDown, far.TunnelDown = true, true
	plan, problems := podnet.NewPlan("a", underlayOfA(), []podnet.Node{a, late, far}, podnet.Config{Mode: podnet.VXLAN})
	if len(problems) > 0 {
		t.Error(problems)
	}
	for i, want := range []podnet.Peer{{Node: "b", IPv4: podnet.Direct, IPv6: podnet.Direct}, {Node: "c", IPv4: podnet.VXLAN, IPv6: podnet.VXLAN}} {
		if plan.Peers[i] != want {
			t.Errorf("%+v, want %+v", plan.Peers[i], want)
		}
	}
	if plan.Tunnel == nil {
		t.Error("a does not receive by vxlan either")
	}
}
