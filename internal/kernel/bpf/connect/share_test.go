package connect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

func (b *balancer) fate(t testing.TB, name string) uint64 {
	t.Helper()
	all, err := b.Fates()
	testenv.Must(t, err)
	for _, f := range all {
		if f.Name == name {
			return f.Times
		}
	}
	t.Fatalf("nothing is counted as %q", name)
	return 0
}

func (b *balancer) pinned(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, name), nil)
	testenv.Must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

// TestShare: first one pod connects more sockets than its share, then all pods together connect more than the table holds. Sockets
// beyond that are left to rules for packets. Here are none, so their connections fail.
func TestShare(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	testenv.NeedFiles(t, connect.ClientShare+256)
	pod := local(t)
	const end = "10.0.0.1:8080"
	vip := addrPort("172.16.0.1:53")
	nodePort := frontend("0.0.0.0:30080/TCP", end)
	nodePort.Kind = service.NodePort
	b.plan = plan(frontend(vip.String()+"/TCP", end), frontend(vip.String()+"/UDP", end), nodePort)
	b.set(t)
	answer(t, addrPort(end))
	dial := func(p service.Protocol, to netip.AddrPort) (socket, error) {
		s := newSocket(t, false, p)
		return s, s.connect(to)
	}
	left := func(who, why string) {
		t.Helper()
		before := b.fate(t, why)
		s, err := dial(service.UDP, vip)
		defer s.close()
		if !errors.Is(err, unix.ENETUNREACH) || b.fate(t, why) != before+1 {
			t.Errorf("%s: %v, and %d are counted as %s, %d before", who, err, b.fate(t, why), why, before)
		}
	}
	all := make([]socket, connect.ClientShare)
	var cookie uint64
	testenv.Must(t, pod.Do(func() (err error) {
		for i := range all {
			if all[i], err = dial(service.UDP, vip); err != nil {
				return fmt.Errorf("socket %d: %w", i, err)
			}
		}
		if hasCookie(t) {
			cookie, err = unix.GetsockoptUint64(all[0].fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		}
		return err
	}))
	crowded, err := b.Crowded()
	if err != nil || len(crowded) != 1 || cookie != 0 && crowded[0] != cookie {
		t.Errorf("with their share are %v, want %d; %v", crowded, cookie, err)
	}
	testenv.Must(t, pod.Do(func() error {
		left("a pod with its share", "share")
		// It closes one, and there is room for another.
		all[0].close()
		s, err := dial(service.UDP, vip)
		testenv.Must(t, err)
		if got := s.peer(t); got != vip {
			t.Errorf("the peer is %s, want %s", got, vip)
		}
		all[0] = s
		left("a pod with its share again", "share")
		return nil
	}))
	if got := reach(t, false, service.TCP, vip); got.String() != end {
		t.Errorf("another client meets %s", got)
	}

	// All shares are full.
	peers := b.pinned(t, pin.Peers)
	if peers.MaxEntries() != connect.MaxPeers {
		t.Errorf("there is room for %d", peers.MaxEntries())
	}
	var fill []uint64
	for i := range uint64(connect.MaxPeers) {
		if peers.Put(1<<60+i, make([]byte, 40)) != nil {
			break
		}
		fill = append(fill, 1<<60+i)
	}
	left("a full table", "full")
	if hasCookie(t) {
		if got := reach(t, false, service.TCP, addrPort("127.0.0.1:30080")); got.String() != end {
			t.Errorf("a node port at a loopback address meets %s: no rules for packets answer there", got)
		}
	}
	for _, c := range fill {
		testenv.Must(t, peers.Delete(c))
	}
	if got := reach(t, false, service.TCP, vip); got.String() != end {
		t.Errorf("when there is room again, a client meets %s", got)
	}
	for _, s := range all {
		s.close()
	}
	if list, err := b.Translations(); err != nil || len(list) > 0 {
		t.Errorf("all sockets are closed, and there are %d, %v", len(list), err)
	}
	if crowded, err := b.Crowded(); err != nil || len(crowded) > 0 {
		t.Errorf("all sockets are closed, and with their share are %v, %v", crowded, err)
	}
}

// TestTalks: a pod sends from more sockets than any table holds while another client waits for an answer.
func TestTalks(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	pod := local(t)
	const end, own = "10.0.0.1:8080", 16
	answer(t, addrPort(end))
	var all []service.Frontend
	for i := range own + 1 {
		all = append(all, frontend(fmt.Sprintf("172.16.0.%d:80/UDP", i+1), end))
	}
	b.plan = plan(all...)
	b.set(t)
	vip := addrPort("172.16.0.1:80")
	c := newSocket(t, false, service.UDP)
	defer c.close()
	testenv.Must(t, c.send(vip))
	testenv.Must(t, pod.Do(func() error {
		for range 40_000 {
			s := newSocket(t, false, service.UDP)
			testenv.Must(t, s.send(vip))
			s.close()
		}
		return nil
	}))
	if who, from := c.receive(t); who.String() != end || from != vip {
		t.Errorf("%s answers, as %s", who, from)
	}

	// One socket has room for a few Services. A packet to one more is left to the rules for packets.
	for round := range 3 {
		for i := range own {
			to := at(fmt.Sprintf("172.16.0.%d", i+1), 80)
			testenv.Must(t, c.send(to))
			if _, from := c.receive(t); from != to {
				t.Errorf("round %d: what was sent to %s is answered as from %s", round, to, from)
			}
		}
	}
	before := b.fate(t, "socket")
	if err := c.send(at(fmt.Sprintf("172.16.0.%d", own+1), 80)); !errors.Is(err, unix.ENETUNREACH) || b.fate(t, "socket") != before+1 {
		t.Errorf("one Service more: %v, and %d are counted, %d before", err, b.fate(t, "socket"), before)
	}
}

// TestConnectedUDP: connected sockets, as resolvers have, that name the Service with each packet, or that are older than the Service.
func TestConnectedUDP(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			vip := at(s.vip, service.DNSPort)
			b.plan = plan()
			b.set(t)
			// A server at the address stands for rules for packets.
			addLocal(t, vip.Addr())
			answer(t, vip)
			before := newSocket(t, s.v6, service.UDP)
			defer before.close()
			testenv.Must(t, before.connect(vip))
			var ends []string
			for _, e := range s.ends {
				ends = append(ends, at(e, 8080).String())
				answer(t, at(e, 8080))
			}
			b.plan = plan(frontend(vip.String()+"/UDP", ends...))
			b.set(t)
			after := newSocket(t, s.v6, service.UDP)
			defer after.close()
			testenv.Must(t, after.connect(vip))
			tr, found, err := b.Translated(after.cookie(t))
			if err != nil || !found {
				t.Fatalf("it is not translated: %v", err)
			}
			for i := range 20 {
				for _, c := range []struct {
					socket
					who netip.AddrPort
				}{{before, vip}, {after, tr.Backend}} {
					if i%2 == 0 {
						testenv.Must(t, c.send(vip))
					} else {
						_, err := unix.Write(c.fd, []byte("?"))
						testenv.Must(t, err)
					}
					if who, from := c.receive(t); who != c.who || from != vip {
						t.Errorf("%s answers, as %s; want %s as %s", who, from, c.who, vip)
					}
				}
			}
		})
	}
}

// TestLastingUDP: connected sockets that may outlive their endpoint are left to rules for packets, for which a server at the
// address stands. It makes no difference that a socket was translated before, when it asked for a name.
func TestLastingUDP(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			vip, resolver, end := at(s.vip, 80), at(s.others, service.DNSPort), at(s.ends[0], 8080)
			b.plan = plan(frontend(vip.String()+"/UDP", end.String()), frontend(resolver.String()+"/UDP", end.String()))
			b.set(t)
			addLocal(t, vip.Addr())
			answer(t, vip)
			answer(t, end)
			c := newSocket(t, s.v6, service.UDP)
			defer c.close()
			for _, to := range []netip.AddrPort{vip, resolver, vip} {
				testenv.Must(t, c.connect(to))
				want := vip
				if to == resolver {
					want = end
				}
				for i := range 4 {
					if i%2 == 0 {
						testenv.Must(t, c.send(to))
					} else {
						_, err := unix.Write(c.fd, []byte("?"))
						testenv.Must(t, err)
					}
					if who, from := c.receive(t); who != want || from != to {
						t.Errorf("%s answers, as %s; want %s, as %s", who, from, want, to)
					}
				}
				if got := c.peer(t); got != to {
					t.Errorf("the peer is %s, want %s", got, to)
				}
			}
		})
	}
}

// TestMPTCP: the socket below an MPTCP socket is left to rules for packets, since it closes without an event.
func TestMPTCP(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	for _, s := range sides {
		t.Run(s.name, func(t *testing.T) {
			end, vip := at(s.ends[0], 8080), at(s.vip, 80)
			any, lo := netip.IPv4Unspecified(), netip.MustParseAddr("127.0.0.1")
			if end.Addr().Is6() {
				any, lo = netip.IPv6Unspecified(), netip.IPv6Loopback()
			}
			port := frontend(netip.AddrPortFrom(any, 30080).String()+"/TCP", end.String())
			port.Kind = service.NodePort
			b.plan = plan(frontend(vip.String()+"/TCP", end.String()), port)
			b.set(t)
			answer(t, end)
			addLocal(t, vip.Addr())
			answer(t, vip) // this server stands for rules for packets
			c := mptcp(t, s.v6)
			before := b.fate(t, "kernel")
			testenv.Must(t, c.connect(vip))
			if who, _ := c.receive(t); who != vip {
				t.Errorf("it meets %s", who)
			}
			if got := c.peer(t); got != vip {
				t.Errorf("the peer is %s", got)
			}
			if n := b.fate(t, "kernel") - before; n != 1 {
				t.Errorf("%d are counted", n)
			}
			c.close()
			if hasCookie(t) { // rules for packets do not answer at loopback addresses
				c := mptcp(t, s.v6)
				testenv.Must(t, c.connect(netip.AddrPortFrom(lo, 30080)))
				if who, _ := c.receive(t); who != end {
					t.Errorf("at a loopback address it meets %s", who)
				}
				c.close()
			}
			if list, err := b.Translations(); err != nil || len(list) > 0 {
				t.Errorf("all sockets are closed, and there are %v, %v", list, err)
			}
		})
	}
}

// mptcp returns an MPTCP socket.
func mptcp(t *testing.T, v6 bool) socket {
	t.Helper()
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		t.Skip("needs MPTCP:", err)
	}
	testenv.Must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	return socket{fd, v6, service.TCP}
}
