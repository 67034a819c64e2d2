package agent

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

func TestIntact(t *testing.T) {
	a, b, node, other := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	both := []netip.Addr{a, b}
	l := lease.Lease{Addresses: both}
	end := func(change func(*podnet.PodEnd)) podnet.PodEnd {
		e := podnet.PodEnd{MTU: 1400, Routes: both, Neighbours: both, Sources: map[netip.Addr]netip.Addr{a: node}}
		change(&e)
		return e
	}
	for name, c := range map[string]struct {
		change  func(*podnet.PodEnd)
		sources []netip.Addr
		want    bool
	}{
		"as it should be":            {func(*podnet.PodEnd) {}, []netip.Addr{node}, true},
		"another source":             {func(*podnet.PodEnd) {}, []netip.Addr{other}, false},
		"a source that is gone":      {func(*podnet.PodEnd) {}, nil, false},
		"no source, and none wanted": {func(e *podnet.PodEnd) { e.Sources = nil }, nil, true},
		"no source":                  {func(e *podnet.PodEnd) { e.Sources = nil }, []netip.Addr{node}, false},
		"no route":                   {func(e *podnet.PodEnd) { e.Routes = both[:1] }, []netip.Addr{node}, false},
		"no neighbour":               {func(e *podnet.PodEnd) { e.Neighbours = both[1:] }, []netip.Addr{node}, false},
		"another MTU":                {func(e *podnet.PodEnd) { e.MTU = 1500 }, []netip.Addr{node}, false},
	} {
		if got := intact(end(c.change), l, 1400, c.sources); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	own := podnet.Node{Addrs: []netip.Addr{node, other, b}}
	for _, c := range []struct{ local, want []netip.Addr }{
		{[]netip.Addr{node, other, b}, []netip.Addr{node, b}},
		{[]netip.Addr{other}, []netip.Addr{other}},
		{[]netip.Addr{a}, nil},
	} {
		local := map[netip.Addr]bool{}
		for _, x := range c.local {
			local[x] = true
		}
		if got := podSources(own, local); !slices.Equal(got, c.want) {
			t.Errorf("of %v the node has %v: sources are %v, want %v", own.Addrs, c.local, got, c.want)
		}
	}
}
