package conntrack

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"golang.org/x/sys/unix"
)

func TestSetMark(t *testing.T) {
	n, endpoints := services(t)
	c := n.conntrack(t)
	for v6, to := range map[bool]netip.AddrPort{false: at("10.96.0.10", 53), true: at("fd00:96::a", 53)} {
		ask(t, n.connected(t, unix.SOCK_DGRAM, to), endpoints[0][v6])
	}
	linktest.Run(t, n.Namespace, "ping", "-c1", "10.244.0.1")
	linktest.Run(t, n.Namespace, "ping", "-c1", "fd00:244::1")
	insert(t, c, append(many(service.TCP, 300), inserted{service.SCTP, at("10.244.0.9", 4711), at("10.96.0.10", 80), at("10.244.1.5", 8080), 7}))
	mark := func(bits uint32, set, cleared int, marked func(Entry) bool) {
		t.Helper()
		s, r, err := c.SetMark(t.Context(), bits, marked)
		if err != nil || s != set || r != cleared {
			t.Errorf("marked %d, unmarked %d, %v; want %d and %d", s, r, err, set, cleared)
		}
	}
	const one, other = 1 << 28, 1 << 3
	all := func(Entry) bool { return true }
	none := func(Entry) bool { return false }
	tcp := func(e Entry) bool { return e.Protocol == service.TCP }
	mark(one, 305, 0, all)
	mark(one, 0, 0, all)
	mark(other, 300, 0, tcp)
	mark(one, 0, 5, tcp)
	seen := map[service.Protocol]uint32{}
	testenv.Must(t, c.Entries(t.Context(), Filter{AnyProtocol: true}, func(e Entry) error {
		seen[e.Protocol] |= e.Mark
		return nil
	}))
	if len(seen) != 5 || seen[service.TCP] != one|other || seen[service.UDP]|seen[service.SCTP]|seen[unix.IPPROTO_ICMP]|seen[unix.IPPROTO_ICMPV6] != 0 {
		t.Errorf("marks are %#x", seen)
	}
	mark(one|other, 0, 300, none)
	mark(one, 0, 0, none)
}

// TestAdopt has connections that begin before anything asks for connection tracking.
func TestAdopt(t *testing.T) {
	n := newSpace(t)
	n.addrs(t, "10.244.0.1", "10.244.0.2", "fd00:244::1", "fd00:244::2")
	var want []Tuple
	var clients []net.Conn
	testenv.Must(t, n.Do(func() error {
		for _, addr := range []string{"10.244.0.1", "fd00:244::1"} {
			l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at(addr, 80)))
			testenv.Must(t, err)
			t.Cleanup(func() { l.Close() })
			client, err := net.Dial("tcp", l.Addr().String())
			testenv.Must(t, err)
			server, err := l.Accept()
			testenv.Must(t, err)
			t.Cleanup(func() { client.Close(); server.Close() })
			clients = append(clients, server)
			want = append(want, Tuple{Source: client.LocalAddr().(*net.TCPAddr).AddrPort(), Destination: at(addr, 80)})
		}
		return nil
	}))
	sockets, err := OpenSockets(n.path)
	testenv.Must(t, err)
	defer sockets.Close()
	got := map[Tuple]int{}
	testenv.Must(t, sockets.Connections(context.Background(), func(c Tuple) error { got[c]++; return nil }))
	if len(got) != 2 || got[want[0]] != 2 || got[want[1]] != 2 {
		t.Errorf("connections are %v, want %v, each of both ends", got, want)
	}

	// Servers are the first to send when connection tracking begins.
	n.nft(t, "table inet t {\nchain output { type filter hook output priority 0; ct state established accept\n}\n}")
	for _, c := range clients {
		_, err := c.Write([]byte("x"))
		testenv.Must(t, err)
	}
	c := n.conntrack(t)
	turned := entries(t, c, Filter{})
	for _, e := range turned {
		if e.Original != want[0].reversed() && e.Original != want[1].reversed() {
			t.Errorf("%s is there; want entries that began with the servers", e)
		}
	}
	for _, adopts := range []int{2, 0} {
		if n, err := c.Adopt(t.Context(), want); err != nil || n != adopts {
			t.Errorf("adopted %d, %v, want %d", n, err, adopts)
		}
	}
	all := entries(t, c, Filter{})
	for _, e := range all {
		if e.Original != want[0] && e.Original != want[1] || e.Status&(Assured|SeenReply) != Assured|SeenReply {
			t.Errorf("%s, status %#x; want %v", e, e.Status, want)
		}
	}
	if len(turned) != 2 || len(all) != 2 {
		t.Errorf("%d entries before, %d after, want 2", len(turned), len(all))
	}
	for _, c := range clients { // which kernel finds to belong to the connections
		_, err := c.Write([]byte("x"))
		testenv.Must(t, err)
	}
	if again := entries(t, c, Filter{}); len(again) != 2 {
		t.Errorf("then there are %d entries", len(again))
	}
	if _, err := c.Adopt(t.Context(), []Tuple{{}}); err == nil {
		t.Error("a connection without addresses is adopted")
	}
}

// BenchmarkSetMark is what a recheck takes where nothing changes.
func BenchmarkSetMark(b *testing.B) {
	n := newSpace(b)
	c := n.conntrack(b)
	insert(b, c, many(service.TCP, 50000))
	for b.Loop() {
		_, _, err := c.SetMark(b.Context(), 1<<28, func(Entry) bool { return false })
		testenv.Must(b, err)
	}
}
