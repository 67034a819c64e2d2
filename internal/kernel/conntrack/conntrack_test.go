package conntrack

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/testenv"
	"golang.org/x/sys/unix"
)

var udp = []service.Protocol{service.UDP}

// translation translates packets to the Services to an endpoint, 0 or 1.
func translation(endpoint int) string {
	return fmt.Sprintf(`table inet services
delete table inet services
table inet services {
	chain output { type nat hook output priority -100;
		ip daddr 10.96.0.10 udp dport 53 dnat ip to 10.244.0.%[1]d:5300
		ip6 daddr fd00:96::a udp dport 53 dnat ip6 to [fd00:244::%[1]d]:5300
		ip daddr 10.96.0.11 udp dport 53 dnat ip to 10.244.0.2:5300
		ip6 daddr fd00:96::b udp dport 53 dnat ip6 to [fd00:244::2]:5300
	}
}`, endpoint+1)
}

// services is a namespace with two endpoints of each family, to which rules translate the Services' addresses.
func services(t *testing.T) (n space, endpoints [2]map[bool]int) {
	n = newSpace(t)
	n.addrs(t, "10.244.0.1", "10.244.0.2", "10.96.0.10", "10.96.0.11", "fd00:244::1", "fd00:244::2", "fd00:96::a", "fd00:96::b")
	n.nft(t, translation(0))
	for i := range endpoints {
		endpoints[i] = map[bool]int{
			false: n.bound(t, unix.SOCK_DGRAM, at(fmt.Sprintf("10.244.0.%d", i+1), 5300)),
			true:  n.bound(t, unix.SOCK_DGRAM, at(fmt.Sprintf("fd00:244::%d", i+1), 5300)),
		}
	}
	return n, endpoints
}

func TestSweep(t *testing.T) {
	t.Run("filtered here", func(t *testing.T) { testSweep(t, countUnfiltered) })
	t.Run("filtered by the kernel", func(t *testing.T) { testSweep(t, 0) })
}

func testSweep(t *testing.T, unfiltered uint32) {
	n, endpoints := services(t)
	c := n.conntrack(t)
	c.unfiltered = unfiltered
	ctx := context.Background()
	one, two := map[bool]int{}, map[bool]int{}
	want := map[string]bool{} // flows, and whether they are translated
	for _, v6 := range []bool{false, true} {
		service1, service2, direct := at("10.96.0.10", 53), at("10.96.0.11", 53), at("10.244.0.2", 5300)
		endpoint1 := at("10.244.0.1", 5300)
		if v6 {
			service1, service2, direct = at("fd00:96::a", 53), at("fd00:96::b", 53), at("fd00:244::2", 5300)
			endpoint1 = at("fd00:244::1", 5300)
		}
		one[v6], two[v6] = n.connected(t, unix.SOCK_DGRAM, service1), n.connected(t, unix.SOCK_DGRAM, service2)
		third := n.connected(t, unix.SOCK_DGRAM, direct)
		ask(t, one[v6], endpoints[0][v6])
		ask(t, two[v6], endpoints[1][v6])
		ask(t, third, endpoints[1][v6])
		want[fmt.Sprintf("UDP %s > %s, answered by %s", local(t, one[v6]), service1, endpoint1)] = true
		want[fmt.Sprintf("UDP %s > %s, answered by %s", local(t, two[v6]), service2, direct)] = true
		want[fmt.Sprintf("UDP %s > %s, answered by %s", local(t, third), direct, direct)] = false
	}
	check := func(when string) {
		t.Helper()
		all, translated := entries(t, c, Filter{Protocols: udp}), entries(t, c, Filter{Protocols: udp, DNAT: true})
		if got, want := slices.Sorted(maps.Keys(all)), slices.Sorted(maps.Keys(want)); !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", when, got, want)
		}
		for key, dnat := range want {
			e := all[key]
			if _, found := translated[key]; found != dnat || (e.Status&DNAT != 0) != dnat || e.Status&SeenReply == 0 || e.Timeout == 0 {
				t.Errorf("%s: %s: listed as translated is %t, want %t; status %#x, timeout %s", when, key, found, dnat, e.Status, e.Timeout)
			}
		}
		if len(entries(t, c, Filter{Protocols: []service.Protocol{service.TCP, service.SCTP}})) > 0 {
			t.Errorf("%s: there are entries of other protocols", when)
		}
	}
	check("at first")
	n.nft(t, translation(1)) // the first endpoint is gone, but existing flows keep it
	for v6, client := range one {
		ask(t, client, endpoints[0][v6])
	}
	stale := func(e Entry) bool {
		return e.Reply.Source == at("10.244.0.1", 5300) || e.Reply.Source == at("fd00:244::1", 5300)
	}
	for _, deletes := range []int{2, 0} {
		if deleted, err := c.Sweep(ctx, udp, stale); err != nil || deleted != deletes {
			t.Errorf("the sweep deletes %d, %v, want %d", deleted, err, deletes)
		}
		maps.DeleteFunc(want, func(key string, _ bool) bool { return stale(mustEntry(t, key)) })
		check("swept")
	}
	for v6, client := range one {
		ask(t, client, endpoints[1][v6])
	}
	for v6, client := range two {
		ask(t, client, endpoints[1][v6])
	}
	if deleted, err := c.Sweep(ctx, nil, func(Entry) bool { return true }); err != nil || deleted != 0 {
		t.Errorf("a sweep of no protocol deletes %d, %v", deleted, err)
	}
}

// TestSweepStale sweeps with service.Index, for each reason why a flow is stale.
func TestSweepStale(t *testing.T) {
	n, endpoints := services(t)
	c := n.conntrack(t)
	frontend := func(to string, port uint16, endpoint string) service.Frontend {
		b := service.Backends{Endpoints: []netip.AddrPort{at(endpoint, 5300)}}
		return service.Frontend{Key: service.Key{Addr: netip.MustParseAddr(to), Protocol: service.UDP, Port: port}, Inside: b, Outside: b}
	}
	index := service.NewIndex(service.Plan{Frontends: []service.Frontend{
		frontend("10.96.0.10", 53, "10.244.0.1"), frontend("10.96.0.10", 54, "10.244.0.1"),
		frontend("fd00:96::a", 53, "fd00:244::2"), // the endpoint was ::1 when the flow began
		frontend("fd00:96::b", 53, "fd00:244::2"),
	}}, []netip.Prefix{netip.MustParsePrefix("10.96.0.0/24")}, nil)
	stale := map[netip.AddrPort]bool{}
	for _, flow := range []struct {
		to     string
		port   uint16
		server int // the endpoint's number, or -1
		stale  bool
	}{
		{"10.96.0.10", 53, 0, false},
		{"10.96.0.11", 53, 1, true}, // a Service that was deleted
		{"10.96.0.10", 54, -1, true},
		{"10.96.0.11", 54, -1, false},
		{"fd00:96::a", 53, 0, true},
		{"fd00:96::b", 53, 1, false},
		{"10.244.0.1", 5300, 0, false}, // no Service
	} {
		fd := n.connected(t, unix.SOCK_DGRAM, at(flow.to, flow.port))
		stale[local(t, fd)] = flow.stale
		if flow.server >= 0 {
			ask(t, fd, endpoints[flow.server][at(flow.to, 0).Addr().Is6()])
		} else if _, err := unix.Write(fd, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(entries(t, c, Filter{Protocols: udp})); got != len(stale) {
		t.Fatalf("there are %d flows, want %d", got, len(stale))
	}
	deleted, err := c.Sweep(context.Background(), udp, func(e Entry) bool {
		return index.Stale(e.Protocol, e.Original.Destination, e.Reply.Source, e.Status&DNAT != 0)
	})
	if err != nil || deleted != 3 {
		t.Errorf("deleted %d, %v, want 3", deleted, err)
	}
	for key, e := range entries(t, c, Filter{Protocols: udp}) {
		if stale[e.Original.Source] {
			t.Errorf("%s is there still", key)
		}
		delete(stale, e.Original.Source)
	}
	for from, gone := range stale {
		if !gone {
			t.Errorf("the flow from %s has gone", from)
		}
	}
}

// mustEntry parses the source of the replies from the output of String.
func mustEntry(t *testing.T, s string) Entry {
	t.Helper()
	var from, to, by string
	if _, err := fmt.Sscanf(s, "UDP %s > %s answered by %s", &from, &to, &by); err != nil {
		t.Fatal(s, err)
	}
	return Entry{Reply: Tuple{Source: netip.MustParseAddrPort(by)}}
}

// TestSweepNewer: a flow ends, and a new one with the same original tuple begins, after the sweep has found the first one stale and
// before it deletes it.
func TestSweepNewer(t *testing.T) {
	n, endpoints := services(t)
	c, other := n.conntrack(t), n.conntrack(t)
	clients := map[bool]int{
		false: n.connected(t, unix.SOCK_DGRAM, at("10.96.0.10", 53)),
		true:  n.connected(t, unix.SOCK_DGRAM, at("fd00:96::a", 53)),
	}
	sameID := 0
	for round := range 20 {
		from, to := round%2, 1-round%2
		for v6, client := range clients {
			ask(t, client, endpoints[from][v6])
		}
		var olds []Entry
		deleted, err := c.Sweep(context.Background(), udp, func(e Entry) bool {
			if len(olds) == 0 {
				n.nft(t, translation(to))
			}
			olds = append(olds, e)
			if gone, err := other.Delete(e); err != nil || !gone {
				t.Fatalf("delete %s: %t, %v", e, gone, err)
			}
			v6 := e.Original.Source.Addr().Is6()
			ask(t, clients[v6], endpoints[to][v6])
			return true
		})
		if err != nil || deleted != 0 || len(olds) != 2 {
			t.Fatalf("the sweep deletes %d of %d, %v; want 0 of 2", deleted, len(olds), err)
		}
		all := entries(t, c, Filter{Protocols: udp})
		if len(all) != 2 {
			t.Fatalf("there are %d flows, want the 2 new ones", len(all))
		}
		for _, e := range all {
			for _, old := range olds {
				if e.Original == old.Original && e.ID == old.ID {
					sameID++
				}
			}
		}
	}
	t.Logf("%d of 40 new entries had the number of the one before", sameID)
}

// TestEntriesOf creates entries without packets: SCTP, zones, and TCP, which is not swept.
func TestEntriesOf(t *testing.T) {
	t.Run("filtered here", func(t *testing.T) { testEntriesOf(t, countUnfiltered) })
	t.Run("filtered by the kernel", func(t *testing.T) { testEntriesOf(t, 0) })
}

func testEntriesOf(t *testing.T, unfiltered uint32) {
	c := newSpace(t).conntrack(t)
	c.unfiltered = unfiltered
	client4, to4, endpoint4 := at("10.244.0.9", 4711), at("10.96.0.10", 80), at("10.244.1.5", 8080)
	client6, to6, endpoint6 := at("fd00:244::9", 4711), at("fd00:96::a", 80), at("fd00:244:1::5", 8080)
	var all []inserted
	for _, p := range []service.Protocol{service.TCP, service.UDP, service.SCTP} {
		for _, zone := range []uint16{0, 7} {
			all = append(all, inserted{p, client4, to4, endpoint4, zone}, inserted{p, client6, to6, endpoint6, zone})
		}
	}
	insert(t, c, all)
	if got := len(entries(t, c, Filter{})); got != len(all) {
		t.Fatalf("listed %d entries, want %d", got, len(all))
	}
	left := len(all)
	for _, p := range []service.Protocol{service.UDP, service.SCTP} {
		for _, zone := range []uint16{7, 0} {
			for key, e := range entries(t, c, Filter{Protocols: []service.Protocol{p}, DNAT: true}) {
				if e.Reply.Source != endpoint4 && e.Reply.Source != endpoint6 {
					t.Errorf("%s is answered by another", key)
				}
			}
			deleted, err := c.Sweep(context.Background(), []service.Protocol{p}, func(e Entry) bool { return e.Original.Zone == zone })
			if err != nil || deleted != 2 {
				t.Errorf("%s, zone %d: deleted %d, %v, want 2", p, zone, deleted, err)
			}
			if left -= 2; len(entries(t, c, Filter{})) != left {
				t.Errorf("%s, zone %d: %d entries are left, want %d", p, zone, len(entries(t, c, Filter{})), left)
			}
		}
	}
	for key, e := range entries(t, c, Filter{}) {
		other := e
		other.ID++
		if found, err := c.Delete(other); err != nil || found {
			t.Errorf("%s with another number is deleted: %t, %v", key, found, err)
		}
	}
	if _, err := c.Delete(Entry{Protocol: service.TCP}); err == nil {
		t.Error("an entry without addresses, which would mean all, is deleted")
	}
	if got := len(entries(t, c, Filter{})); got != left {
		t.Errorf("%d entries are left, want %d", got, left)
	}
}

// TestEntriesEnd stops a listing early. The next one is complete.
func TestEntriesEnd(t *testing.T) {
	n := newSpace(t)
	c := n.conntrack(t)
	insert(t, c, many(service.UDP, 2000))
	enough := errors.New("enough")
	seen := 0
	if err := c.Entries(context.Background(), Filter{}, func(Entry) error { seen++; return enough }); !errors.Is(err, enough) || seen != 1 {
		t.Errorf("%v after %d entries, want %v after 1", err, seen, enough)
	}
	ctx, cancel := context.WithCancel(context.Background())
	deleted, err := c.Sweep(ctx, udp, func(Entry) bool { cancel(); return true })
	if !errors.Is(err, context.Canceled) || deleted == 0 || deleted == 2000 {
		t.Errorf("the sweep that is ended deletes %d, %v", deleted, err)
	}
	if got := len(entries(t, c, Filter{})); got != 2000-deleted {
		t.Errorf("%d entries are left, want %d", got, 2000-deleted)
	}
	if rest, err := c.Sweep(context.Background(), udp, func(Entry) bool { return true }); err != nil || rest != 2000-deleted {
		t.Errorf("the next sweep deletes %d, %v, want %d", rest, err, 2000-deleted)
	}
}

func many(protocol service.Protocol, n int) []inserted {
	all := make([]inserted, n)
	for i := range all {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(i >> 16), byte(i >> 8)}), uint16(1024+i%256))
		all[i] = inserted{protocol: protocol, client: client, to: at("10.96.0.10", 53)}
	}
	return all
}

// BenchmarkSweep sweeps 100,000 entries of which none is stale, a few among 100,000 of TCP, and some that it deletes.
func BenchmarkSweep(b *testing.B) {
	const count = 100_000
	sweep := func(b *testing.B, c *Table, stale func(Entry) bool) (deleted int) {
		deleted, err := c.Sweep(context.Background(), []service.Protocol{service.UDP, service.SCTP}, stale)
		testenv.Must(b, err)
		return deleted
	}
	b.Run("none stale", func(b *testing.B) {
		c := newSpace(b).conntrack(b)
		insert(b, c, many(service.UDP, count))
		b.ReportAllocs()
		for b.Loop() {
			seen := 0
			sweep(b, c, func(Entry) bool { seen++; return false })
			if seen != count {
				b.Fatalf("saw %d entries, want %d", seen, count)
			}
		}
	})
	b.Run("1000 none stale", func(b *testing.B) {
		c := newSpace(b).conntrack(b)
		insert(b, c, append(many(service.TCP, 1000), many(service.UDP, 1000)...))
		for b.Loop() {
			sweep(b, c, func(Entry) bool { return false })
		}
	})
	b.Run("beside TCP", func(b *testing.B) {
		c := newSpace(b).conntrack(b)
		insert(b, c, append(many(service.TCP, count), many(service.UDP, 100)...))
		b.ReportAllocs()
		for b.Loop() {
			sweep(b, c, func(Entry) bool { return false })
		}
	})
	b.Run("empty", func(b *testing.B) {
		c := newSpace(b).conntrack(b)
		for b.Loop() {
			sweep(b, c, func(Entry) bool { return false })
		}
	})
	b.Run("10000 stale", func(b *testing.B) {
		c := newSpace(b).conntrack(b)
		all := many(service.UDP, 10_000)
		for b.Loop() {
			b.StopTimer()
			insert(b, c, all)
			b.StartTimer()
			if deleted := sweep(b, c, func(Entry) bool { return true }); deleted != len(all) {
				b.Fatalf("deleted %d, want %d", deleted, len(all))
			}
		}
	})
}
