package dataplane

import (
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/link/linktest"
	"github.com/fathom-network/fathom/internal/podnet"
	"github.com/fathom-network/fathom/internal/testenv"
)

// The settings of a node are put back as they were, unless somebody else changed them: then they are his.
func TestLoopback(t *testing.T) {
	node, dir := linktest.Namespace(t), t.TempDir()
	l := loopback{newSettings(node, dir)}
	check := func(on bool, want string) {
		t.Helper()
		testenv.Must(t, loopback{newSettings(node, dir)}.Route(on)) // of any agent, also of one that was started since
		if got, err := node.SysctlValue(routeLocalnet); err != nil || got != want {
			t.Errorf("routed %v: %s, %v; want %s", on, got, err, want)
		}
		if on, err := l.Routed(); err != nil || on != (want == "1") {
			t.Errorf("%v, %v", on, err)
		}
	}
	check(false, "0")
	for range 2 {
		check(true, "1")
		check(true, "1")
		testenv.Must(t, l.settings.remember([]podnet.Sysctl{{Name: "ipv4/ip_forward"}, {Name: "ipv4/conf/none/rp_filter"}}))
		check(false, "0")
		check(false, "0")
	}
	testenv.Must(t, node.Sysctl(routeLocalnet, "1"))
	check(true, "1")
	check(false, "1")
	known, err := l.settings.read()
	if err != nil || len(known) != 1 || known[0].Name != "ipv4/ip_forward" {
		t.Errorf("remembered: %v, %v; want ipv4/ip_forward", known, err)
	}
}

// What is restored when the network goes is what was there before it came: not the settings of its own tunnel, whose
// files are gone by then.
func TestUnknownSettings(t *testing.T) {
	want := []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "1"}, {Name: "ipv4/conf/eth0/rp_filter", Value: "2"}, {Name: "ipv4/conf/fathom.vxlan/rp_filter", Value: "2"}}
	got := unknown(want, []podnet.Sysctl{{Name: "ipv4/ip_forward", Value: "0"}})
	if !slices.Equal(got, want[1:2]) {
		t.Errorf("to be remembered: %v, want %v", got, want[1:2])
	}
}
