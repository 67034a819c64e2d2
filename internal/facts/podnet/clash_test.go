package podnet

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestMACClash is inside of the package because no names are known whose hashes clash.
func TestMACClash(t *testing.T) {
	node := func(name string, age int, addr, cidr string) Node {
		return Node{Name: name, Created: time.Unix(int64(-age), 0),
			Addrs: []netip.Addr{netip.MustParseAddr(addr)}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(cidr)}}
	}
	nodes := []Node{
		node("me", 1, "10.0.1.1", "10.244.1.0/24"), node("x-young", 2, "10.0.2.1", "10.244.2.0/24"),
		node("x-old", 3, "10.0.3.1", "10.244.3.0/24"), node("other", 4, "10.0.4.1", "10.244.4.0/24"),
	}
	p := planner{
		underlay: []Interface{{Name: "eth0", MTU: 1500, Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.1.1/24")}}},
		mac:      func(name string, _ uint32) MAC { return MAC{0: 2, 5: name[0]} },
		told:     map[Problem]bool{},
	}
	plan := p.plan("me", nodes, Config{})
	if len(p.problems) != 1 || p.problems[0].Node != "x-young" || p.problems[0].Reason != MACClash {
		t.Errorf("problems: %v", p.problems)
	}
	if got := plan.String(); strings.Contains(got, "10.244.2.1") || !strings.Contains(got, "10.244.3.1") || len(plan.Forwards) != 2 {
		t.Errorf("want x-old and other to be reached, and x-young not:\n%s", got)
	}
}
