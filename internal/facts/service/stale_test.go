package service

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

var (
	staleEndpoints = []netip.AddrPort{
		netip.MustParseAddrPort("10.244.0.5:53"), netip.MustParseAddrPort("10.244.1.5:53"), netip.MustParseAddrPort("[fd00::5]:53"),
	}
	staleRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/108")}
	staleOthers = []netip.Addr{netip.MustParseAddr("10.96.0.200")}
)

func staleFrontend(kind Kind, protocol Protocol, at string, inside, outside []netip.AddrPort) Frontend {
	to := netip.MustParseAddrPort(at)
	return Frontend{Key: Key{to.Addr(), protocol, to.Port()}, Kind: kind, Inside: Backends{Endpoints: inside}, Outside: Backends{Endpoints: outside}}
}

func stalePlan() Plan {
	both, first, six := staleEndpoints[:2], staleEndpoints[:1], staleEndpoints[2:]
	return Plan{
		Frontends: []Frontend{
			staleFrontend(NodePort, UDP, "0.0.0.0:30053", both, first),
			staleFrontend(NodePort, UDP, "[::]:30053", six, six),
			staleFrontend(ClusterIP, UDP, "10.96.0.10:53", both, both),
			staleFrontend(ClusterIP, TCP, "10.96.0.10:53", both, both),
			staleFrontend(ClusterIP, SCTP, "10.96.0.10:53", both, both),
			staleFrontend(ClusterIP, UDP, "10.96.0.11:53", nil, nil),
			staleFrontend(LoadBalancer, UDP, "203.0.113.7:53", first, both),
			staleFrontend(ClusterIP, UDP, "[fd00:96::a]:53", six, six),
		},
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
	}
}

func TestStale(t *testing.T) {
	x := NewIndex(stalePlan(), staleRanges, staleOthers)
	for _, c := range []struct {
		protocol    Protocol
		to, answers string
		stale       bool
	}{
		{UDP, "10.96.0.10:53", "10.244.0.5:53", false},
		{UDP, "10.96.0.10:53", "10.244.1.5:53", false},
		{UDP, "10.96.0.10:53", "10.244.1.5:54", true},
		{UDP, "10.96.0.10:53", "10.244.9.9:53", true},
		{SCTP, "10.96.0.10:53", "10.244.0.5:53", false},
		{SCTP, "10.96.0.10:53", "10.244.9.9:53", true},
		{TCP, "10.96.0.10:53", "10.244.9.9:53", false},
		{UDP, "[fd00:96::a]:53", "[fd00::5]:53", false},
		{UDP, "[fd00:96::a]:53", "[fd00::6]:53", true},
		// No endpoints.
		{UDP, "10.96.0.11:53", "10.244.0.5:53", true},
		{UDP, "10.96.0.11:53", "", false}, // new packets are rejected, tracked or not
		// It makes no difference for which clients it is an endpoint.
		{UDP, "203.0.113.7:53", "10.244.1.5:53", false},
		{UDP, "203.0.113.7:53", "10.244.9.9:53", true},
		// Not translated.
		{UDP, "10.96.0.10:53", "", true},
		{UDP, "203.0.113.7:53", "", true},
		{SCTP, "10.96.0.10:53", "", false},
		{TCP, "10.96.0.10:53", "", false},
		{UDP, "192.0.2.1:30053", "", false},
		{UDP, "10.244.0.5:53", "", false},
		{UDP, "10.96.0.99:53", "", false},
		// NodePorts.
		{UDP, "192.0.2.1:30053", "10.244.1.5:53", false},
		{UDP, "192.0.2.1:30053", "10.244.9.9:53", true},
		{UDP, "127.0.0.1:30053", "10.244.9.9:53", true},
		{UDP, "127.9.0.1:30053", "10.244.0.5:53", false},
		{UDP, "192.0.2.2:30053", "10.244.9.9:53", false}, // another node's
		{UDP, "[2001:db8::1]:30053", "[fd00::5]:53", false},
		{UDP, "[2001:db8::1]:30053", "[fd00::6]:53", true},
		{UDP, "[::1]:30053", "[fd00::6]:53", true},
		// No frontend.
		{UDP, "10.96.0.99:53", "10.244.0.5:53", true},
		{SCTP, "10.96.0.99:53", "10.244.0.5:53", true},
		{TCP, "10.96.0.99:53", "10.244.0.5:53", false},
		{UDP, "[fd00:96::b]:53", "[fd00::5]:53", true},
		{UDP, "10.96.0.200:53", "10.244.0.5:53", false}, // another proxy's
		{UDP, "192.0.2.1:8053", "10.244.0.5:53", false}, // a host port
		{UDP, "198.51.100.1:53", "10.244.0.5:53", false},
	} {
		to, answers, translated := netip.MustParseAddrPort(c.to), netip.MustParseAddrPort(c.to), c.answers != ""
		if translated {
			answers = netip.MustParseAddrPort(c.answers)
		}
		if got := x.Stale(c.protocol, to, answers, translated); got != c.stale {
			t.Errorf("%s to %s, answered by %q: stale is %t, want %t", c.protocol, c.to, c.answers, got, c.stale)
		}
	}
}

// TestCut: sockets are connected to endpoints instead of frontends.
func TestCut(t *testing.T) {
	plan := stalePlan()
	plan.Frontends = append(plan.Frontends, staleFrontend(ClusterIP, UDP, "10.96.0.12:80", staleEndpoints[:1], nil),
		staleFrontend(NodePort, TCP, "[::]:30080", staleEndpoints[2:], nil))
	x := NewIndex(plan, staleRanges, staleOthers)
	there, notReady, left, gone := Life{Present: true, Serving: true}, Life{Present: true}, Life{}, Life{Gone: true}
	for _, c := range []struct {
		protocol     Protocol
		to, endpoint string
		// whether it is cut with an endpoint that serves, is not ready, has left the Service, is gone
		there, notReady, left, gone bool
	}{
		{TCP, "10.96.0.10:53", "10.244.0.5:53", false, false, false, true},
		{TCP, "[::1]:30080", "[fd00::5]:53", false, false, false, true},
		{TCP, "10.96.0.99:80", "10.244.0.5:53", false, false, false, false},
		{UDP, "10.96.0.10:53", "10.244.0.5:53", false, true, true, true},
		{UDP, "10.96.0.12:80", "10.244.0.5:53", false, false, true, true},
		{UDP, "[::1]:30053", "[fd00::5]:53", false, false, true, true},
		{UDP, "10.96.0.99:80", "10.244.0.5:53", true, true, true, true},
		// By the node's own address.
		{UDP, "127.0.0.1:30053", "192.0.2.1:30053", false, false, false, false},
		{UDP, "[::1]:30053", "[2001:db8::1]:30053", false, false, false, false},
		{UDP, "127.0.0.1:30053", "192.0.2.1:53", false, false, true, true}, // an endpoint on the node's network
	} {
		got := [4]bool{}
		for i, life := range []Life{there, notReady, left, gone} {
			got[i] = x.Cut(c.protocol, netip.MustParseAddrPort(c.to), netip.MustParseAddrPort(c.endpoint), func(Name, netip.AddrPort) Life { return life })
		}
		if want := [4]bool{c.there, c.notReady, c.left, c.gone}; got != want {
			t.Errorf("%s to %s, connected to %s: %v, want %v", c.protocol, c.to, c.endpoint, got, want)
		}
	}
}

// TestIndexGone removes frontends by Apply and by Replace. The index keeps them for two sweeps, unless their addresses are within
// the ranges.
func TestIndexGone(t *testing.T) {
	plan := stalePlan()
	less := plan
	less.Frontends = nil
	var gone []Frontend
	for _, f := range plan.Frontends {
		if f.Kind == ClusterIP {
			less.Frontends = append(less.Frontends, f)
		} else {
			gone = append(gone, f)
		}
	}
	for name, change := range map[string]func(x *Index, there bool){
		"apply": func(x *Index, there bool) {
			if there {
				x.Apply(Change{New: gone})
			} else {
				x.Apply(Change{Old: gone})
			}
		},
		"replace": func(x *Index, there bool) {
			if there {
				x.Replace(plan, staleRanges, staleOthers)
			} else {
				x.Replace(less, staleRanges, staleOthers)
			}
		},
	} {
		x := NewIndex(plan, staleRanges, staleOthers)
		check := func(when string, want bool) {
			t.Helper()
			for _, to := range []string{"203.0.113.7:53", "192.0.2.1:30053", "127.0.0.1:30053"} {
				if got := x.Stale(UDP, netip.MustParseAddrPort(to), staleEndpoints[0], true); got != want {
					t.Errorf("%s: %s, %s: stale is %t, want %t", name, when, to, got, want)
				}
				if x.Stale(UDP, netip.MustParseAddrPort(to), netip.MustParseAddrPort(to), false) && want {
					t.Errorf("%s: %s, %s: untranslated is stale", name, when, to)
				}
			}
			if x.Stale(UDP, netip.MustParseAddrPort("10.96.0.10:53"), staleEndpoints[0], true) {
				t.Errorf("%s: %s: a frontend that stays is stale", name, when)
			}
		}
		check("at first", false)
		change(x, false)
		check("gone", true)
		x.Swept()
		check("swept once", true)
		change(x, true)
		check("back", false)
		change(x, false)
		x.Swept()
		x.Swept()
		check("swept twice", false)
		if _, found := x.Find(UDP, netip.MustParseAddrPort("192.0.2.1:30053")); found {
			t.Errorf("%s: a NodePort that has gone is found", name)
		}
	}
}

// BenchmarkStale checks 100,000 flows to 10,000 Services of 10 endpoints each.
func BenchmarkStale(b *testing.B) {
	var p Plan
	var flows []struct{ to, answers netip.AddrPort }
	for i := range 10_000 {
		f := Frontend{Key: Key{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), UDP, 53}, Affinity: time.Hour}
		for k := range 10 {
			endpoint := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(100 + k), byte(i >> 8), byte(i)}), 53)
			f.Inside.Endpoints = append(f.Inside.Endpoints, endpoint)
			flows = append(flows, struct{ to, answers netip.AddrPort }{netip.AddrPortFrom(f.Addr, 53), endpoint})
		}
		f.Outside = f.Inside
		p.Frontends = append(p.Frontends, f)
	}
	x := NewIndex(p, staleRanges, nil)
	for b.Loop() {
		for _, f := range flows {
			if x.Stale(UDP, f.to, f.answers, true) {
				b.Fatal(fmt.Sprint(f, " is stale"))
			}
		}
	}
}
