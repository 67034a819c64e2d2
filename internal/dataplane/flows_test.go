package dataplane

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

	"github.com/fathom-network/fathom/internal/bootclock"
	"github.com/fathom-network/fathom/internal/flow"
	"github.com/fathom-network/fathom/internal/lease"
	"github.com/fathom-network/fathom/internal/link"
	"github.com/fathom-network/fathom/internal/link/linktest"
	"github.com/fathom-network/fathom/internal/service"
	"github.com/fathom-network/fathom/internal/testenv"
)

func TestHasDeparted(t *testing.T) {
	at := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	direct := func(p service.Protocol, from, to string) flow.Entry {
		return flow.Entry{Protocol: p, Original: flow.Tuple{Source: at(from), Destination: at(to)}, Reply: flow.Tuple{Source: at(to), Destination: at(from)}}
	}
	hostPort := direct(service.UDP, "192.0.2.9:4000", "192.0.2.1:5000")
	hostPort.Reply.Source = at("10.1.0.2:53")
	masqueraded := direct(service.UDP, "10.1.0.2:4000", "192.0.2.9:53")
	masqueraded.Reply.Destination = at("192.0.2.1:4000")
	for name, c := range map[string]struct {
		entry                flow.Entry
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

// TestDeparted: a client of a pod's UDP host port goes on sending after the pod has gone. What it sends does not come to
// the next pod with the address, which has no port.
func TestDeparted(t *testing.T) {
	for family, a := range map[string]struct{ client, node, pod string }{
		"ip":  {"192.0.2.9/24", "192.0.2.1/24", "10.1.0.2"},
		"ip6": {"2001:db8::9/64", "2001:db8::1/64", "fd00::2"},
	} {
		t.Run(family, func(t *testing.T) {
			node, path := linktest.NamespaceAt(t)
			client := linktest.Namespace(t)
			testenv.Must(t, node.SetPair(link.Device{Name: "eth0", Alias: "x"}, client, link.Device{Name: "eth0", Alias: "x"}))
			testenv.Must(t, node.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix(a.node)}))
			testenv.Must(t, client.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix(a.client)}))
			address := netip.MustParseAddr(a.pod)
			attach := func(name string) net.PacketConn {
				pod := linktest.Namespace(t)
				testenv.Must(t, node.AddPod(pod, link.Pod{Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 1, 2}, HostDevice: name, HostMAC: net.HardwareAddr{2, 0, 0, 0, 2, 2},
					Alias: name, Addrs: []netip.Addr{address}}))
				var conn net.PacketConn
				testenv.Must(t, pod.Do(func() (err error) {
					conn, err = net.ListenPacket("udp", netip.AddrPortFrom(address, 53).String())
					return err
				}))
				t.Cleanup(func() { conn.Close() })
				return conn
			}
			first := attach("first")
			to := netip.AddrPortFrom(address, 53)
			linktest.Run(t, node, "nft", "table inet hostports { chain prerouting { type nat hook prerouting priority -100; udp dport 5000 dnat "+family+" to "+to.String()+"; }; }")
			var conn net.Conn
			testenv.Must(t, client.Do(func() (err error) {
				conn, err = net.Dial("udp", netip.AddrPortFrom(netip.MustParsePrefix(a.node).Addr(), 5000).String())
				return err
			}))
			defer conn.Close()
			hears := func(in net.PacketConn) bool {
				t.Helper()
				if _, err := conn.Write([]byte("x")); err != nil && !errors.Is(err, unix.ECONNREFUSED) {
					t.Fatal(err)
				}
				testenv.Must(t, in.SetReadDeadline(time.Now().Add(200*time.Millisecond)))
				_, _, err := in.ReadFrom(make([]byte, 8))
				return err == nil
			}
			testenv.Eventually(t, "the client reaches the host port", func() (bool, string) { return hears(first), "" })

			testenv.Must(t, node.DeletePod("first", "first"))
			linktest.Run(t, node, "nft", "flush chain inet hostports prerouting")
			remembered := func() (n int) {
				t.Helper()
				c, err := flow.OpenConntrack(path)
				testenv.Must(t, err)
				defer c.Close()
				testenv.Must(t, c.Entries(t.Context(), flow.Filter{}, func(e flow.Entry) error {
					if e.Reply.Source == to {
						n++
					}
					return nil
				}))
				return n
			}
			if n := remembered(); n != 1 {
				t.Fatalf("the kernel remembers %d flows to the pod that is gone: this test has nothing to see", n)
			}
			next := attach("next")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			d := newDeparted(slog.New(slog.DiscardHandler), prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}))
			ended := make(chan struct{})
			go func() { d.run(ctx, path); close(ended) }()
			released := []lease.Released{{Addr: address, At: bootclock.Instant{Boot: "this", At: 1}}}
			d.set(released, map[netip.Addr]bool{address: true})
			testenv.Eventually(t, "the flow is ended", func() (bool, string) { return remembered() == 0, "it is there" })
			if hears(next) {
				t.Error("the next pod with the address hears the client")
			}
			d.set(released, nil) // as the next look does
			d.mu.Lock()
			if len(d.pending) > 0 {
				t.Errorf("%v is ended again", d.pending)
			}
			d.mu.Unlock()
			cancel()
			<-ended
		})
	}
}
