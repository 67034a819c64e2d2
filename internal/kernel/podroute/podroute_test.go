package podroute_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

// loneNode is the namespace of node n0 of a cluster, with an uplink to nowhere.
func loneNode(t testing.TB) *link.Namespace {
	t.Helper()
	n, far := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, n.SetPair(link.Device{Name: "eth0", Alias: "test"}, far, link.Device{Name: "eth0", Alias: "test"}))
	testenv.Must(t, n.SetAddrs("eth0", prefixes("10.200.0.2/16", "fd00:200::2/64")))
	return n
}

// manyNodes makes nodes of which every other one is behind a router; n0 is loneNode.
func manyNodes(count int) []podnet.Node {
	var nodes []podnet.Node
	for i := range count {
		nodes = append(nodes, podnet.Node{
			Name: fmt.Sprintf("n%d", i),
			Addrs: []netip.Addr{
				netip.MustParseAddr(fmt.Sprintf("10.20%d.%d.%d", i%2, i/400, i/2%200+2)),
				netip.MustParseAddr(fmt.Sprintf("fd00:20%d::%x", i%2, i/2+2)),
			},
			PodCIDRs: prefixes(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("fd00:10:244:%x::/64", i)),
		})
	}
	return nodes
}

// planOf plans node n0 from what the kernel says of its devices.
func planOf(t testing.TB, n *link.Namespace, nodes []podnet.Node, config podnet.Config) podnet.Plan {
	t.Helper()
	underlay, err := podroute.Underlay(n)
	testenv.Must(t, err)
	plan, problems := podnet.NewPlan("n0", underlay, nodes, config)
	for _, p := range problems {
		if p.Reason != podnet.NotOnSegment {
			t.Fatalf("problem %s", p)
		}
	}
	return plan
}

// holds fails the test unless the kernel holds the plan.
func holds(t testing.TB, n *link.Namespace, plan podnet.Plan) {
	t.Helper()
	have, err := podroute.Read(n, plan.Sysctls)
	testenv.Must(t, err)
	have.Masquerade, have.Guard = plan.Masquerade, plan.Guard // is internal/kernel/ruleset's
	for _, d := range podnet.Diff(plan, have) {
		t.Error(d)
	}
}

func set(t testing.TB, n *link.Namespace, plan podnet.Plan) podnet.Changes {
	t.Helper()
	changes, err := podroute.Set(n, plan)
	testenv.Must(t, err)
	return changes
}

func TestSet(t *testing.T) {
	n := loneNode(t)
	nodes := manyNodes(20)
	foreign := [][]string{
		{"ip", "route", "add", "203.0.113.0/24", "via", "10.200.0.9"},
		{"ip", "route", "add", "203.0.113.1", "via", "10.200.0.9", "proto", "252"}, // as a pod's would be
		{"ip", "neigh", "add", "10.200.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0"},
		{"ip", "link", "add", "other", "type", "vxlan", "id", "9", "dstport", "4788"},
		{"bridge", "fdb", "add", "02:00:00:00:00:0a", "dev", "other", "dst", "10.200.0.9"},
	}
	for _, args := range foreign {
		linktest.Run(t, n, args...)
	}
	untouched := func() {
		t.Helper()
		for _, want := range []struct{ in, text string }{
			{linktest.Run(t, n, "ip", "route"), "203.0.113.0/24 via 10.200.0.9"},
			{linktest.Run(t, n, "ip", "route"), "203.0.113.1 via 10.200.0.9"},
			{linktest.Run(t, n, "ip", "neigh", "show", "dev", "eth0"), "10.200.0.9 lladdr 02:00:00:00:00:09 PERMANENT"},
			{linktest.Run(t, n, "bridge", "fdb", "show", "dev", "other"), "02:00:00:00:00:0a dst 10.200.0.9"},
		} {
			if !strings.Contains(want.in, want.text) {
				t.Errorf("what is not ours is gone: no %q in\n%s", want.text, want.in)
			}
		}
	}
	configs := map[string]podnet.Config{
		"auto": {}, "vxlan": {Mode: podnet.VXLAN}, "direct": {Mode: podnet.Direct},
		"over IPv6": {Underlay: inet.IPv6}, "renamed": {Device: "pods0"}, "other VNI": {VNI: 7}, "other port": {Port: 8472},
		"small": {MTU: 1400}, "standby": {Mode: podnet.Direct, Standby: true},
	}
	for _, order := range []string{"auto", "vxlan", "direct", "over IPv6", "renamed", "other VNI", "other port", "small", "standby", "direct", "auto"} {
		t.Run(order, func(t *testing.T) {
			plan := planOf(t, n, nodes, configs[order])
			set(t, n, plan)
			holds(t, n, plan)
			if again := set(t, n, plan); again.Total() != 0 {
				t.Errorf("the second time changes %+v", again)
			}
			untouched()
		})
	}

	plan := planOf(t, n, nodes, podnet.Config{})
	t.Run("drift", func(t *testing.T) {
		lost, moved := plan.Routes[2], plan.Routes[3] // one by eth0, one by the tunnel
		for _, args := range [][]string{
			{"ip", "route", "add", "10.99.0.0/24", "via", "10.200.0.9", "proto", "251"},
			{"ip", "route", "add", "blackhole", "10.98.0.0/24", "proto", "251"},
			{"ip", "-6", "route", "add", "fd99::/64", "via", "fd00:200::9", "proto", "251"},
			{"ip", "-6", "route", "add", "unreachable", "fd98::/64", "proto", "251"},
			{"ip", "route", "del", lost.To.String()},
			{"ip", "route", "replace", moved.To.String(), "via", "10.200.0.8", "proto", "251"},
			{"ip", "neigh", "add", "10.97.0.1", "lladdr", "02:00:00:00:00:01", "dev", "fathom.vxlan"},
			{"ip", "neigh", "replace", plan.Neighbours[0].Addr.String(), "lladdr", "02:00:00:00:00:02", "dev", "fathom.vxlan"},
			{"bridge", "fdb", "add", "02:00:00:00:00:03", "dev", "fathom.vxlan", "dst", "10.201.0.99"},
			{"bridge", "fdb", "add", "00:00:00:00:00:00", "dev", "fathom.vxlan", "dst", "10.201.0.99"},
			{"bridge", "fdb", "replace", plan.Forwards[1].MAC.String(), "dev", "fathom.vxlan", "dst", "10.201.0.97"},
			{"ip", "addr", "add", "10.96.0.1/32", "dev", "fathom.vxlan"},
			{"ip", "link", "set", "fathom.vxlan", "mtu", "1300"},
			{"sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward"},
		} {
			linktest.Run(t, n, args...)
		}
		have, err := podroute.Read(n, plan.Sysctls)
		testenv.Must(t, err)
		have.Masquerade, have.Guard = plan.Masquerade, plan.Guard
		differences := podnet.Diff(plan, have)
		changes := set(t, n, plan)
		if len(differences) != 14 || changes.Total() != 14 {
			t.Errorf("%d differences, %+v; want 14 of each", len(differences), changes)
			for _, d := range differences {
				t.Log(d)
			}
		}
		holds(t, n, plan)
		untouched()
	})
	t.Run("node gone", func(t *testing.T) {
		fewer := planOf(t, n, nodes[:19], podnet.Config{})
		changes := set(t, n, fewer)
		want := podnet.Changes{Routes: diff.Count{Removed: 2}, Neighbours: diff.Count{Removed: 2}, Forwards: diff.Count{Removed: 1}}
		if changes != want {
			t.Errorf("one node less changes %+v, want %+v", changes, want)
		}
		holds(t, n, fewer)
	})
	t.Run("device gone", func(t *testing.T) {
		linktest.Run(t, n, "ip", "link", "del", "fathom.vxlan")
		set(t, n, plan)
		holds(t, n, plan)
	})
	t.Run("half made", func(t *testing.T) {
		linktest.Run(t, n, "ip", "link", "set", "fathom.vxlan", "alias", "")
		set(t, n, plan)
		holds(t, n, plan)
	})
	t.Run("own range changes", func(t *testing.T) {
		moved := append([]podnet.Node{{Name: "n0", Addrs: nodes[0].Addrs, PodCIDRs: prefixes("10.177.0.0/24", "fd00:177::/64")}}, nodes[1:]...)
		changed := planOf(t, n, moved, podnet.Config{})
		set(t, n, changed)
		holds(t, n, changed)
	})
	t.Run("no node", func(t *testing.T) {
		if _, err := podroute.Set(n, podnet.Plan{}); err == nil {
			t.Error("an empty plan is taken for one that wants nothing")
		}
	})
	t.Run("in the way", func(t *testing.T) {
		set(t, n, planOf(t, n, nodes, podnet.Config{Mode: podnet.Direct}))
		linktest.Run(t, n, "ip", "route", "del", plan.Routes[2].To.String())
		linktest.Run(t, n, "ip", "route", "add", plan.Routes[2].To.String(), "via", "10.200.0.9")
		_, err := podroute.Set(n, plan)
		if err == nil || !strings.Contains(err.Error(), plan.Routes[2].To.String()) || !strings.Contains(err.Error(), "not ours") {
			t.Errorf("a foreign route in the way gives %v", err)
		}
		if foreign, rest := podroute.ForeignRoutes(err); len(foreign) != 1 || rest != nil {
			t.Errorf("of a foreign route in the way, %v is foreign and %v the rest", foreign, rest)
		}
		if got := linktest.Run(t, n, "ip", "route", "show", plan.Routes[2].To.String()); !strings.Contains(got, "10.200.0.9") {
			t.Errorf("the foreign route is gone: %s", got)
		}
		linktest.Run(t, n, "ip", "route", "del", plan.Routes[2].To.String())
		set(t, n, plan) // the rest was done, and this is all that is missing
		holds(t, n, plan)

		linktest.Run(t, n, "ip", "link", "del", "fathom.vxlan")
		linktest.Run(t, n, "ip", "link", "add", "fathom.vxlan", "type", "vxlan", "id", "9", "dstport", "4787")
		if _, err := podroute.Set(n, plan); err == nil || !strings.Contains(err.Error(), "not ours") {
			t.Errorf("a foreign device in the way gives %v", err)
		} else if foreign, rest := podroute.ForeignRoutes(err); len(foreign) > 0 || rest == nil {
			t.Errorf("of a foreign device in the way, %v are foreign routes", foreign)
		}
		have, err := podroute.Read(n, nil)
		testenv.Must(t, err)
		if len(have.Routes) != 20 { // its own two, and two of each of nine on the segment
			t.Errorf("with a foreign device in the way there are %d routes, want all direct ones:\n%s", len(have.Routes), have)
		}
		linktest.Run(t, n, "ip", "link", "del", "fathom.vxlan")
		linktest.Run(t, n, "ip", "link", "add", "another", "type", "vxlan", "id", "4242", "dstport", "4789")
		if _, err := podroute.Set(n, plan); err == nil || !strings.Contains(err.Error(), "VNI 4242") {
			t.Errorf("a foreign device of our VNI gives %v", err)
		}
	})
}

func TestOneFamily(t *testing.T) {
	n := loneNode(t)
	for _, is4 := range []bool{true, false, true} {
		nodes := manyNodes(10)
		for i := range nodes {
			nodes[i].Addrs = slices.DeleteFunc(nodes[i].Addrs, func(a netip.Addr) bool { return a.Is4() != is4 })
			nodes[i].PodCIDRs = slices.DeleteFunc(nodes[i].PodCIDRs, func(p netip.Prefix) bool { return p.Addr().Is4() != is4 })
		}
		plan := planOf(t, n, nodes, podnet.Config{})
		set(t, n, plan)
		holds(t, n, plan)
		if again := set(t, n, plan); again.Total() != 0 {
			t.Errorf("the second time changes %+v", again)
		}
	}
}

// TestForeignChanges reads and sets while somebody else changes routes all the time.
func TestForeignChanges(t *testing.T) {
	n := loneNode(t)
	plan := planOf(t, n, manyNodes(300), podnet.Config{})
	set(t, n, plan)
	cmd := exec.Command("ip", "-batch", "-")
	stdin, err := cmd.StdinPipe()
	testenv.Must(t, err)
	testenv.Must(t, n.Start(cmd))
	stop, stopped := make(chan bool), make(chan bool)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				stdin.Close()
				return
			default:
				for i := range 50 {
					fmt.Fprintf(stdin, "route add 203.0.113.%d via 10.200.0.9\nroute add fdff::%x via fd00:200::9\n", i, i)
				}
				for i := range 50 {
					fmt.Fprintf(stdin, "route del 203.0.113.%d via 10.200.0.9\nroute del fdff::%x via fd00:200::9\n", i, i)
				}
			}
		}
	}()
	for range 50 {
		holds(t, n, plan)
		if changes := set(t, n, plan); changes.Total() != 0 {
			t.Errorf("changed %+v", changes)
		}
	}
	close(stop)
	<-stopped
	_ = cmd.Wait()
}

func BenchmarkSet(b *testing.B) {
	n := loneNode(b)
	nodes := manyNodes(1000)
	full, fewer := planOf(b, n, nodes, podnet.Config{}), planOf(b, n, nodes[:999], podnet.Config{})
	empty := planOf(b, n, nodes[:1], podnet.Config{})
	b.Run("cold", func(b *testing.B) {
		var spent time.Duration
		for b.Loop() {
			set(b, n, empty)
			start := time.Now()
			set(b, n, full)
			spent += time.Since(start)
		}
		b.ReportMetric(float64(spent.Milliseconds())/float64(b.N), "ms/cold")
	})
	holds(b, n, full)
	b.Run("one node", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			plan := full
			if i%2 == 0 {
				plan = fewer
			}
			if changes := set(b, n, plan); changes.Total() != 5 {
				b.Fatalf("%+v", changes)
			}
		}
	})
	b.Run("nothing", func(b *testing.B) {
		for b.Loop() {
			set(b, n, fewer)
		}
	})
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			if _, err := podroute.Read(n, full.Sysctls); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// TestFollow moves a node and adds one: the routes are there before anything is compared, and what is left of
// the ways that are not wanted any more is for Set.
func TestFollow(t *testing.T) {
	n := loneNode(t)
	config := podnet.Config{Mode: podnet.Direct}
	nodes := manyNodes(8)
	from := planOf(t, n, nodes[:6], config)
	set(t, n, from)
	nodes[2].Addrs[0] = netip.MustParseAddr("10.200.9.9")
	nodes = append(nodes[:4], nodes[6:]...) // n4 goes, n6 comes
	to := planOf(t, n, nodes, config)
	changes, err := podroute.Follow(n, from, to)
	testenv.Must(t, err)
	if want := (diff.Count{Added: 2, Corrected: 1}); changes.Routes != want {
		t.Errorf("followed %v, want %v", changes.Routes, want)
	}
	have, err := podroute.Read(n, nil)
	testenv.Must(t, err)
	for _, r := range to.Routes {
		if !slices.Contains(have.Routes, r) {
			t.Errorf("route %s is missing", r)
		}
	}
	if changes := set(t, n, to); changes.Routes != (diff.Count{Removed: 2}) {
		t.Errorf("afterwards %v", changes.Routes)
	}
	holds(t, n, to)

	// A plan of which nothing is known to hold, and one whose tunnel changes, are Set's alone.
	for what, from := range map[string]podnet.Plan{"nothing": {}, "another tunnel": planOf(t, n, nodes, podnet.Config{Mode: podnet.VXLAN})} {
		if changes, err := podroute.Follow(n, from, to); err != nil || changes.Total() != 0 {
			t.Errorf("from %s: %v, %v", what, changes, err)
		}
	}
	// A route of somebody else's in the place of a new one stays.
	linktest.Run(t, n, "ip", "route", "add", "10.100.50.0/24", "via", "10.200.7.7", "proto", "99")
	more := to
	more.Routes = append(slices.Clone(to.Routes), podnet.Route{To: netip.MustParsePrefix("10.100.50.0/24"), Via: netip.MustParseAddr("10.200.9.9"), Device: "eth0"})
	if changes, err := podroute.Follow(n, to, more); err != nil || changes.Total() != 0 {
		t.Errorf("followed %v, %v", changes, err)
	}
	if out := linktest.Run(t, n, "ip", "route", "show", "10.100.50.0/24"); !strings.Contains(out, "via 10.200.7.7") || strings.Contains(out, "9.9") {
		t.Errorf("%s", out)
	}
}
