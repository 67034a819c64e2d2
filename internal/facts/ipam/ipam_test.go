package ipam_test

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

func addrs(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

func set(list ...string) map[netip.Addr]bool {
	m := map[netip.Addr]bool{}
	for _, a := range addrs(list...) {
		m[a] = true
	}
	return m
}

func TestReserved(t *testing.T) {
	for _, test := range []struct {
		prefix, first string
		reserved      []string
		size          uint64
	}{
		{"10.1.0.0/24", "10.1.0.1", []string{"10.1.0.0", "10.1.0.1", "10.1.0.255"}, 253},
		{"10.1.0.0/30", "10.1.0.1", []string{"10.1.0.0", "10.1.0.1", "10.1.0.3"}, 1},
		{"10.1.0.0/31", "", nil, 2},
		{"10.1.0.7/32", "", nil, 1},
		{"255.255.255.0/24", "255.255.255.1", []string{"255.255.255.0", "255.255.255.1", "255.255.255.255"}, 253},
		{"fd00::/64", "fd00::1", []string{"fd00::", "fd00::1"}, math.MaxUint64},
		{"fd00::/120", "fd00::1", []string{"fd00::", "fd00::1"}, 254},
		{"fd00::/126", "fd00::1", []string{"fd00::", "fd00::1"}, 2},
		{"fd00::/127", "", nil, 2},
		{"fd00::9/128", "", nil, 1},
	} {
		p := netip.MustParsePrefix(test.prefix)
		first, found := ipam.FirstHost(p)
		if found != (test.first != "") || found && first.String() != test.first {
			t.Errorf("FirstHost(%s) = %s, %v; want %q", p, first, found, test.first)
		}
		if got := ipam.Size(p); got != test.size {
			t.Errorf("Size(%s) = %d, want %d", p, got, test.size)
		}
		if p.Addr().BitLen()-p.Bits() > 8 {
			continue
		}
		var reserved []string
		for a := p.Addr(); a.IsValid() && p.Contains(a); a = a.Next() {
			if ipam.Reserved(p, a) {
				reserved = append(reserved, a.String())
			}
		}
		if !slices.Equal(reserved, test.reserved) {
			t.Errorf("of %s %v are reserved, want %v", p, reserved, test.reserved)
		}
	}
}

func TestChoose(t *testing.T) {
	pools := []ipam.Pool{
		{Name: "special", Ranges: prefixes("10.9.0.0/29"), ExplicitOnly: true},
		{Name: "default", Ranges: prefixes("10.1.0.0/30", "fd00::/64", "10.1.0.8/30", "10.1.0.32/32")},
		{Name: "none"},
	}
	blocks := []ipam.Pool{
		{Name: "public", Ranges: prefixes("192.0.2.0/30"), Fixed: prefixes("192.0.2.77/32", "fd07::7/128"), ExplicitOnly: true, Whole: true},
		{Name: "only-fixed", Fixed: prefixes("192.0.2.99/32"), ExplicitOnly: true, Whole: true},
	}
	for _, test := range []struct {
		name    string
		request ipam.Request
		state   ipam.State
		want    string
		err     string
	}{
		{name: "one of each family", want: "10.1.0.2 fd00::2"},
		{name: "the next block", state: ipam.State{InUse: set("10.1.0.2")}, want: "10.1.0.10 fd00::2"},
		{name: "a block of one", state: ipam.State{InUse: set("10.1.0.2"), Cooling: set("10.1.0.10")}, want: "10.1.0.32 fd00::2"},
		{name: "behind the last", want: "10.1.0.32 fd00::8",
			state: ipam.State{Last: map[string]netip.Addr{"default IPv4": addrs("10.1.0.10")[0], "default IPv6": addrs("fd00::7")[0]}}},
		{name: "round", want: "10.1.0.2 fd00::2",
			state: ipam.State{Last: map[string]netip.Addr{"default IPv4": addrs("10.1.0.32")[0], "default IPv6": addrs("fd00::ffff:ffff:ffff:ffff")[0]}}},
		{name: "a last of a range that is gone", want: "10.1.0.2 fd00::2",
			state: ipam.State{Last: map[string]netip.Addr{"default IPv4": addrs("192.0.2.1")[0]}}},
		{name: "exhausted", state: ipam.State{InUse: set("10.1.0.2", "10.1.0.10"), Cooling: set("10.1.0.32")},
			err: `pool "default" has no free IPv4 address on this node: 2 of 3 in use, 1 cooling down`},
		{name: "what cools down yields when nothing else is free, the first that is of the pool", want: "10.1.0.32 fd00::2",
			state: ipam.State{InUse: set("10.1.0.2"), Cooling: set("10.1.0.10", "10.1.0.32"), Yield: addrs("10.9.0.2", "10.1.0.1", "10.1.0.2", "10.1.0.32", "10.1.0.10")}},
		{name: "and not before", want: "10.1.0.10 fd00::2",
			state: ipam.State{InUse: set("10.1.0.2"), Cooling: set("10.1.0.32"), Yield: addrs("10.1.0.32")}},
		{name: "by pool", request: ipam.Request{Pool: "special"}, want: "10.9.0.2"},
		{name: "by address", request: ipam.Request{Addresses: addrs("10.9.0.5")}, want: "10.9.0.5"},
		{name: "one by address, the other as it comes", request: ipam.Request{Addresses: addrs("fd00::77")}, want: "10.1.0.2 fd00::77"},
		{name: "of another pool", request: ipam.Request{Pool: "special", Addresses: addrs("10.1.0.2")}, err: "none of the ranges"},
		{name: "of no pool", request: ipam.Request{Addresses: addrs("203.0.113.1")}, err: "in no range"},
		{name: "unknown pool", request: ipam.Request{Pool: "x"}, err: `pool "x" has no ranges on this node, which has those of ["special" "default" "none" "public" "only-fixed"]`},
		{name: "empty pool", request: ipam.Request{Pool: "none"}, err: "has no ranges"},
		{name: "reserved", request: ipam.Request{Addresses: addrs("10.1.0.1")}, err: "not for pods"},
		{name: "in use", request: ipam.Request{Addresses: addrs("10.1.0.2")}, state: ipam.State{InUse: set("10.1.0.2")}, err: "in use by another"},
		{name: "cooling", request: ipam.Request{Addresses: addrs("10.1.0.2")}, state: ipam.State{Cooling: set("10.1.0.2")}, err: "cooling down"},
		{name: "of a block, all of it is for pods", request: ipam.Request{Pool: "public"}, want: "192.0.2.0"},
		{name: "a fixed one only by request", request: ipam.Request{Pool: "public"}, state: ipam.State{InUse: set("192.0.2.0", "192.0.2.1", "192.0.2.2")}, want: "192.0.2.3"},
		{name: "not when the others are gone", request: ipam.Request{Pool: "public"}, state: ipam.State{InUse: set("192.0.2.0", "192.0.2.1", "192.0.2.2", "192.0.2.3")}, err: "4 of 4 in use"},
		{name: "a fixed one", request: ipam.Request{Addresses: addrs("192.0.2.77")}, want: "192.0.2.77"},
		{name: "two fixed ones", request: ipam.Request{Pool: "public", Addresses: addrs("192.0.2.77", "fd07::7")}, want: "192.0.2.77 fd07::7"},
		{name: "a fixed one of a pool without others", request: ipam.Request{Pool: "only-fixed", Addresses: addrs("192.0.2.99")}, want: "192.0.2.99"},
		{name: "a pool without others", request: ipam.Request{Pool: "only-fixed"}, err: "has no ranges"},
		{name: "two of a family", request: ipam.Request{Addresses: addrs("10.1.0.2", "10.1.0.10")}, err: "both IPv4"},
	} {
		test.state.Pools = blocks
		c, err := ipam.Choose(pools, test.request, test.state)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) || ipam.IsTemporary(err) == ipam.IsRequest(err) {
				t.Errorf("%s: %v; want %q", test.name, err, test.err)
			}
			continue
		}
		var got []string
		for _, a := range c.Addresses {
			got = append(got, a.String())
		}
		if err != nil || strings.Join(got, " ") != test.want {
			t.Errorf("%s: %v, %v; want %s", test.name, got, err, test.want)
		}
	}
	if _, err := ipam.Choose(pools[:1], ipam.Request{}, ipam.State{}); err == nil {
		t.Error("a pool that is for explicit requests only is given to any pod")
	}
}

// TestSequences takes and releases at random: nobody gets what another has, what is reserved or what cools, and
// as long as an address is free one is found. An address rests until all others had their turn.
func TestSequences(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		pool := ipam.Pool{Name: "p", Ranges: prefixes("10.1.0.0/28", "10.7.0.0/29", "10.3.0.4/31", "fd00::/124")}
		s := ipam.State{InUse: map[netip.Addr]bool{}, Cooling: map[netip.Addr]bool{}, Last: map[string]netip.Addr{}}
		var held [][]netip.Addr
		for range 500 {
			switch rnd.IntN(3) {
			case 0:
				if len(held) > 0 {
					i := rnd.IntN(len(held))
					for _, a := range held[i] {
						delete(s.InUse, a)
						s.Cooling[a] = true
					}
					held = slices.Delete(held, i, i+1)
				}
			case 1:
				clear(s.Cooling)
			default:
				u4, u6 := pool.Usage(inet.IPv4, s), pool.Usage(inet.IPv6, s)
				full := u4.InUse+u4.Cooling == u4.Size || u6.InUse+u6.Cooling == u6.Size
				c, err := ipam.Choose([]ipam.Pool{pool}, ipam.Request{}, s)
				if (err != nil) != full {
					t.Fatalf("%+v %+v: %v, %v", u4, u6, c, err)
				}
				if err != nil {
					continue
				}
				for _, a := range c.Addresses {
					i := slices.IndexFunc(pool.Ranges, func(r netip.Prefix) bool { return r.Contains(a) })
					if i < 0 || s.InUse[a] || s.Cooling[a] || ipam.Reserved(pool.Ranges[i], a) {
						t.Fatalf("%s is given out: %+v", a, s)
					}
					s.InUse[a] = true
				}
				for k, v := range c.Last {
					s.Last[k] = v
				}
				held = append(held, c.Addresses)
			}
		}
	}
}

func TestAnAddressRests(t *testing.T) {
	pool := ipam.Pool{Name: "p", Ranges: prefixes("10.1.0.0/24", "10.2.0.0/24")}
	s := ipam.State{Last: map[string]netip.Addr{}}
	seen := map[netip.Addr]bool{}
	for range 2 * 253 {
		c, err := ipam.Choose([]ipam.Pool{pool}, ipam.Request{}, s)
		if err != nil || seen[c.Addresses[0]] {
			t.Fatalf("%v again, %v: %d others had no turn yet", c.Addresses, err, 2*253-len(seen))
		}
		seen[c.Addresses[0]] = true
		s.Last = c.Last
	}
}
