package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bootclock"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func TestHasDeparted(t *testing.T) {
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	direct := func(p service.Protocol, from, to string) conntrack.Entry {
		return conntrack.Entry{Protocol: p, Original: conntrack.Tuple{Source: at(from), Destination: at(to)}, Reply: conntrack.Tuple{Source: at(to), Destination: at(from)}}
	}
	hostPort := direct(service.UDP, "192.0.2.9:4000", "192.0.2.1:5000")
	hostPort.Reply.Source = at("10.1.0.2:53")
	masqueraded := direct(service.UDP, "10.1.0.2:4000", "192.0.2.9:53")
	masqueraded.Reply.Destination = at("192.0.2.1:4000")
	for name, c := range map[string]struct {
		entry                conntrack.Entry
		whenFree, whenLeased bool
	}{
		"a host port":           {hostPort, true, true},
		"what the pod asked":    {masqueraded, true, true},
		"a connection to it":    {direct(service.TCP, "192.0.2.9:4000", "10.1.0.2:80"), true, false},
		"a connection from it":  {direct(service.TCP, "10.1.0.2:4000", "192.0.2.9:80"), true, false},
		"an association":        {direct(service.SCTP, "10.1.0.3:4000", "10.1.0.2:80"), true, true},
		"a flow of another pod": {direct(service.UDP, "10.1.0.3:4000", "192.0.2.9:53"), false, false},
	} {
		for free, want := range map[bool]bool{true: c.whenFree, false: c.whenLeased} {
			if got := hasDeparted(c.entry, map[netip.Addr]bool{netip.MustParseAddr("10.1.0.2"): free}); got != want {
				t.Errorf("%s, and the address is free: %t: ended is %t", name, free, got)
			}
		}
	}
}

func TestIsLeftOver(t *testing.T) {
	at := netip.MustParseAddrPort
	leases := []lease.Lease{
		{Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("fd00::2")}, HostPorts: []lease.HostPort{
			{Protocol: "udp", Port: 5000, Container: 53}, {Protocol: "tcp", Port: 5001, Container: 53},
			{Protocol: "udp", Addr: netip.MustParseAddr("192.0.2.1"), Port: 5002, Container: 53}, {Protocol: "udp", Addr: netip.IPv4Unspecified(), Port: 5003, Container: 53},
		}},
		{Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.3")}, HostPorts: []lease.HostPort{}},
		{Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.4")}},
	}
	p := newPodPorts(leases, []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00::/64")},
		map[netip.Addr]bool{netip.MustParseAddr("192.0.2.1"): true, netip.MustParseAddr("192.0.2.2"): true, netip.MustParseAddr("2001:db8::1"): true})
	serves := func(p service.Protocol, to netip.AddrPort) bool { return p == service.UDP && to.Port() == 30000 }
	for _, c := range []struct {
		protocol    service.Protocol
		to, answers string
		left        bool
	}{
		{service.UDP, "192.0.2.1:5000", "10.1.0.2:53", false},
		{service.UDP, "[2001:db8::1]:5000", "[fd00::2]:53", false},
		{service.UDP, "127.0.0.1:5000", "10.1.0.2:53", false},
		{service.UDP, "192.0.2.2:5003", "10.1.0.2:53", false},
		{service.UDP, "192.0.2.1:5002", "10.1.0.2:53", false},
		{service.UDP, "192.0.2.2:5002", "10.1.0.2:53", true}, // another address of the node
		{service.UDP, "192.0.2.1:5000", "10.1.0.2:54", true},
		{service.UDP, "192.0.2.1:5001", "10.1.0.2:53", true}, // by TCP alone
		{service.UDP, "192.0.2.1:5000", "10.1.0.3:53", true}, // a pod without ports
		{service.UDP, "127.0.0.1:5000", "10.1.0.3:53", true},
		{service.TCP, "192.0.2.1:5000", "10.1.0.3:53", false},
		{service.SCTP, "192.0.2.1:5000", "10.1.0.3:53", false},
		{service.UDP, "192.0.2.1:30000", "10.1.0.3:53", false},  // a Service's
		{service.UDP, "10.96.0.10:5000", "10.1.0.3:53", false},  // none of the node's addresses
		{service.UDP, "192.0.2.1:5000", "10.1.0.4:53", false},   // its ports are not known
		{service.UDP, "192.0.2.1:5000", "10.1.0.9:53", true},    // nobody's address
		{service.UDP, "192.0.2.1:30000", "10.1.0.9:53", true},   // whatever led there
		{service.UDP, "192.0.2.1:5000", "172.17.0.9:53", false}, // none of ours
	} {
		e := conntrack.Entry{Protocol: c.protocol, Status: conntrack.DNAT, Original: conntrack.Tuple{Source: at("192.0.2.9:4000"), Destination: at(c.to)}, Reply: conntrack.Tuple{Source: at(c.answers), Destination: at("192.0.2.9:4000")}}
		if got := p.isLeftOver(e, serves); got != c.left {
			t.Errorf("%s: left over is %t, want %t", e, got, c.left)
		}
		e.Status = 0
		if p.isLeftOver(e, serves) {
			t.Errorf("%s is left over, and nothing is translated", e)
		}
	}
}

// hostPort is a node with a client of a pod's UDP host port, and the pod.
type hostPort struct {
	node, client *link.Namespace
	path, family string
	at           netip.Addr     // the node's address
	to           netip.AddrPort // the pod's
	conn         net.Conn       // the client's
}

// newHostPort brings it about that the client has reached the pod "first".
func newHostPort(t *testing.T, family, client, at, pod string) (h *hostPort, first net.PacketConn) {
	t.Helper()
	h = &hostPort{family: family, client: linktest.Namespace(t), at: netip.MustParsePrefix(at).Addr(), to: netip.AddrPortFrom(netip.MustParseAddr(pod), 53)}
	h.node, h.path = linktest.NamespaceAt(t)
	testenv.Must(t, h.node.SetPair(link.Device{Name: "eth0", Alias: "x"}, h.client, link.Device{Name: "eth0", Alias: "x"}))
	testenv.Must(t, h.node.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix(at)}))
	testenv.Must(t, h.client.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix(client)}))
	first = h.attach(t, "first")
	linktest.Run(t, h.node, "nft", "table inet hostports { chain prerouting { type nat hook prerouting priority -100; udp dport 5000 dnat "+family+" to "+h.to.String()+"; }; }")
	testenv.Must(t, h.client.Do(func() (err error) {
		h.conn, err = net.Dial("udp", netip.AddrPortFrom(h.at, 5000).String())
		return err
	}))
	t.Cleanup(func() { h.conn.Close() })
	testenv.Eventually(t, "the client reaches the host port", func() (bool, string) { return h.hears(t, first), "" })
	return h, first
}

// attach makes a pod with the address.
func (h *hostPort) attach(t *testing.T, name string) net.PacketConn {
	t.Helper()
	pod := linktest.Namespace(t)
	testenv.Must(t, podlink.Add(h.node, pod, podlink.Pod{Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 1, 2}, HostDevice: name, HostMAC: net.HardwareAddr{2, 0, 0, 0, 2, 2},
		Alias: name, Addrs: []netip.Addr{h.to.Addr()}}))
	var conn net.PacketConn
	testenv.Must(t, pod.Do(func() (err error) {
		conn, err = net.ListenPacket("udp", h.to.String())
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

// hears has the client send, and says whether it is heard.
func (h *hostPort) hears(t *testing.T, in net.PacketConn) bool {
	t.Helper()
	if _, err := h.conn.Write([]byte("x")); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatal(err)
	}
	testenv.Must(t, in.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
	_, _, err := in.ReadFrom(make([]byte, 8))
	return err == nil
}

// replace deletes the first pod, as DEL does with its port, and gives its address to another, which has none.
func (h *hostPort) replace(t *testing.T) (next net.PacketConn) {
	t.Helper()
	testenv.Must(t, podlink.Delete(h.node, "first", "first"))
	// A port of another pod is still there: the kernel translates nothing while no rule at all does.
	linktest.Run(t, h.node, "nft", "flush chain inet hostports prerouting; add rule inet hostports prerouting udp dport 6000 dnat "+h.family+" to "+h.to.String())
	if n := len(h.remembered(t)); n != 1 {
		t.Fatalf("the kernel remembers %d flows to the pod that is gone: this test has nothing to see", n)
	}
	return h.attach(t, "next")
}

// remembered are the numbers of the kernel's entries that lead to the pods.
func (h *hostPort) remembered(t *testing.T) (ids []uint32) {
	t.Helper()
	c, err := conntrack.OpenTable(h.path)
	testenv.Must(t, err)
	defer c.Close()
	testenv.Must(t, c.Entries(t.Context(), conntrack.Filter{}, func(e conntrack.Entry) error {
		if e.Reply.Source == h.to {
			ids = append(ids, e.ID)
		}
		return nil
	}))
	return ids
}

// lease is of a pod with the address.
func (h *hostPort) lease(ports ...lease.HostPort) lease.Lease {
	return lease.Lease{Addresses: []netip.Addr{h.to.Addr()}, HostPorts: append([]lease.HostPort{}, ports...)}
}

// run runs the agent's part, until the function that it returns is called.
func (h *hostPort) run(t *testing.T, leases ...lease.Lease) (f *podFlows, tell func([]lease.Released, map[netip.Addr]bool), end func()) {
	t.Helper()
	f = newPodFlows(slog.New(slog.DiscardHandler), prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}), func(service.Protocol, netip.AddrPort) bool { return false })
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { f.run(ctx, h.path); close(ended) }()
	p := newPodPorts(leases, []netip.Prefix{netip.PrefixFrom(h.to.Addr(), h.to.Addr().BitLen())}, map[netip.Addr]bool{h.at: true})
	return f, func(released []lease.Released, inUse map[netip.Addr]bool) { f.set(released, inUse, p) }, func() { cancel(); <-ended }
}

var families = map[string]struct{ client, node, pod string }{
	"ip":  {"192.0.2.9/24", "192.0.2.1/24", "10.1.0.2"},
	"ip6": {"2001:db8::9/64", "2001:db8::1/64", "fd00::2"},
}

// TestDeparted: a client of a pod's UDP host port goes on sending after the pod has gone. What it sends does not come to
// the next pod with the address, which has no port.
func TestDeparted(t *testing.T) {
	for family, a := range families {
		t.Run(family, func(t *testing.T) {
			h, _ := newHostPort(t, family, a.client, a.node, a.pod)
			next := h.replace(t)
			unknown := h.lease()
			unknown.HostPorts = nil
			f, tell, end := h.run(t, unknown)
			defer end()
			released := []lease.Released{{Addr: h.to.Addr(), At: bootclock.Instant{Boot: "this", At: 1}}}
			tell(released, map[netip.Addr]bool{h.to.Addr(): true})
			testenv.Eventually(t, "the flow is ended", func() (bool, string) { return len(h.remembered(t)) == 0, "it is there" })
			if h.hears(t, next) {
				t.Error("the next pod with the address hears the client")
			}
			tell(released, nil) // as the next look does
			f.mu.Lock()
			if len(f.pending) > 0 {
				t.Errorf("%v is ended again", f.pending)
			}
			f.mu.Unlock()
		})
	}
}

// TestLeftOver: the same, while no agent ran, and nothing tells any more that the address was given back. A pod that has the
// port keeps its flow.
func TestLeftOver(t *testing.T) {
	for family, a := range families {
		t.Run(family, func(t *testing.T) {
			h, first := newHostPort(t, family, a.client, a.node, a.pod)
			before := h.remembered(t)
			// look is an agent that starts, until it has looked.
			look := func(l lease.Lease) {
				t.Helper()
				f, tell, end := h.run(t, l)
				defer end()
				tell(nil, map[netip.Addr]bool{h.to.Addr(): true})
				f.look()
				// What is told after that is done after that.
				other := netip.MustParseAddr("192.0.2.77")
				testenv.Eventually(t, "the look has begun", func() (bool, string) { return len(f.kick) == 0, "" })
				tell([]lease.Released{{Addr: other}}, nil)
				testenv.Eventually(t, "the look has ended", func() (bool, string) {
					f.mu.Lock()
					defer f.mu.Unlock()
					return len(f.kick) == 0 && len(f.pending) == 0, ""
				})
			}
			look(h.lease(lease.HostPort{Protocol: "udp", Port: 5000, Container: 53}))
			if after := h.remembered(t); len(after) != 1 || after[0] != before[0] || !h.hears(t, first) {
				t.Errorf("the pod has the port, and of its flow %v there is %v", before, after)
			}
			next := h.replace(t)
			if !h.hears(t, next) {
				t.Fatal("the next pod with the address hears nothing before there is an agent: this test has nothing to see")
			}
			look(h.lease())
			if h.hears(t, next) || len(h.remembered(t)) > 0 {
				t.Error("the next pod with the address hears the client")
			}
		})
	}
}
