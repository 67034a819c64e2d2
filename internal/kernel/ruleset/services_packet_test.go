package ruleset_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// The test's network has a node with two pods, a and b; another node, far, with a pod; and a host outside the cluster, out:
//
//	a 10.244.1.2 ──┐                 ┌── 192.0.2.20 far, 10.244.0.2
//	b 10.244.1.3 ──┴ node 192.0.2.10 ┴── 203.0.113.9, 203.0.113.10 out
type lab struct {
	node, a, b, far, out *link.Namespace
	rules                *ruleset.Ruleset
}

// addresses are the network's addresses of one family.
type addresses struct {
	a, b, far, node, out, out2, vip, lb, any, loopback string
	network                                            string // "4" or "6"
}

var families = []addresses{
	{"10.244.1.2", "10.244.1.3", "10.244.0.2", "192.0.2.10", "203.0.113.9", "203.0.113.10", "10.96.0.%d", "198.51.100.%d", "0.0.0.0", "127.0.0.1", "4"},
	{"fd00:10:244:1::2", "fd00:10:244:1::3", "fd00:10:244::2", "2001:db8::10", "2001:db8:2::9", "2001:db8:2::10", "fd00:10:96::%d", "2001:db8:1::%d", "::", "", "6"},
}

func newLab(t testing.TB) *lab {
	t.Helper()
	space := func() *link.Namespace {
		n := linktest.Namespace(t)
		for name, value := range map[string]string{"ipv6/conf/all/disable_ipv6": "0", "ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0",
			"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0"} {
			testenv.Must(t, n.Sysctl(name, value))
		}
		ip(t, n, "link set lo up")
		return n
	}
	l := &lab{node: space(), a: space(), b: space(), far: space(), out: space()}
	testenv.Must(t, l.node.Sysctl("ipv4/conf/default/send_redirects", "0")) // redirects share a rate limit with rejections
	for device, in := range map[string]*link.Namespace{"a": l.a, "b": l.b, "far": l.far, "out": l.out} {
		testenv.Must(t, l.node.SetPair(link.Device{Name: device, Alias: "test"}, in, link.Device{Name: "eth0", Alias: "test"}))
	}
	for name, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/conf/all/route_localnet": "1",
		"ipv4/conf/all/send_redirects": "0"} {
		testenv.Must(t, l.node.Sysctl(name, value))
	}
	for device, pod := range map[string]*link.Namespace{"a": l.a, "b": l.b} {
		last := map[string]string{"a": "2", "b": "3"}[device]
		ip(t, l.node, "addr add 169.254.1.1/32 dev "+device, "addr add fe80::1/64 dev "+device+" nodad",
			"route add 10.244.1."+last+" dev "+device, "route add fd00:10:244:1::"+last+" dev "+device)
		ip(t, pod, "addr add 10.244.1."+last+"/32 dev eth0", "addr add fd00:10:244:1::"+last+"/128 dev eth0 nodad",
			"route add 169.254.1.1 dev eth0", "route add default via 169.254.1.1", "route add default via fe80::1 dev eth0")
	}
	ip(t, l.node, "addr add 192.0.2.10/24 dev far", "addr add 2001:db8::10/64 dev far nodad", "addr add 203.0.113.1/24 dev out", "addr add 2001:db8:2::1/64 dev out nodad",
		"route add 10.244.0.0/24 via 192.0.2.20", "route add fd00:10:244::/64 via 2001:db8::20", "route add default via 203.0.113.9", "route add default via 2001:db8:2::9")
	ip(t, l.far, "addr add 192.0.2.20/24 dev eth0", "addr add 2001:db8::20/64 dev eth0 nodad", "addr add 10.244.0.2/32 dev lo", "addr add fd00:10:244::2/128 dev lo nodad",
		"route add 10.244.1.0/24 via 192.0.2.10", "route add fd00:10:244:1::/64 via 2001:db8::10")
	ip(t, l.out, "addr add 203.0.113.9/24 dev eth0", "addr add 203.0.113.10/24 dev eth0", "addr add 2001:db8:2::9/64 dev eth0 nodad", "addr add 2001:db8:2::10/64 dev eth0 nodad",
		"route add default via 203.0.113.1", "route add default via 2001:db8:2::1")
	testenv.Must(t, l.node.Do(func() (err error) {
		l.rules, err = ruleset.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(l.rules.Close)
	for _, f := range families {
		for addr, in := range map[string]*link.Namespace{f.a: l.a, f.b: l.b, f.far: l.far} {
			serve(t, in, netip.AddrPortFrom(netip.MustParseAddr(addr), 8080))
		}
	}
	return l
}

func ip(t testing.TB, n *link.Namespace, lines ...string) {
	t.Helper()
	for _, line := range lines {
		linktest.Run(t, n, append([]string{"ip"}, strings.Fields(line)...)...)
	}
}

// serve answers TCP and UDP with the server's name and the client's address as the server sees it.
func serve(t testing.TB, n *link.Namespace, at netip.AddrPort) {
	t.Helper()
	serveAs(t, n, at, at.Addr().String())
}

func serveAs(t testing.TB, n *link.Namespace, at netip.AddrPort, name string) {
	t.Helper()
	testenv.Must(t, n.Do(func() error {
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close(); u.Close() })
		answer := func(peer net.Addr) []byte {
			return []byte(name + " " + netip.MustParseAddrPort(peer.String()).Addr().Unmap().String())
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					for b := make([]byte, 100); ; {
						if _, err := c.Read(b); err != nil {
							return
						}
						if _, err := c.Write(answer(c.RemoteAddr())); err != nil {
							return
						}
					}
				}()
			}
		}()
		go func() {
			for b := make([]byte, 100); ; {
				_, peer, err := u.ReadFrom(b)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					_, _ = u.WriteTo(answer(peer), peer)
				}
			}
		}()
		return nil
	}))
}

const (
	patience = 10 * time.Second       // for an answer that is expected
	silence  = 300 * time.Millisecond // for an answer that is not
)

// udpSockets numbers the sockets of dial.
var udpSockets atomic.Uint32

// dial connects from a namespace, and from an address unless it is empty. Each UDP socket has a port of its own: connection
// tracking keeps the flow of a closed socket, and would send the datagrams of the next one to the same endpoint.
func dial(n *link.Namespace, network, from, to string, wait time.Duration) (c net.Conn, err error) {
	d := net.Dialer{Timeout: wait}
	switch {
	case strings.HasPrefix(network, "udp"):
		d.LocalAddr = &net.UDPAddr{IP: net.ParseIP(from), Port: 10000 + int(udpSockets.Add(1)%20000)}
	case from != "":
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	err = n.Do(func() error {
		c, err = d.Dial(network, to)
		return err
	})
	return c, err
}

// say sends a request on a connection, and returns the server's name and the client's address as the server sees it.
func say(c net.Conn, wait time.Duration) (server, client string, err error) {
	if err := c.SetDeadline(time.Now().Add(wait)); err != nil {
		return "", "", err
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return "", "", err
	}
	b := make([]byte, 200)
	size, err := c.Read(b)
	if err != nil {
		return "", "", err
	}
	server, client, _ = strings.Cut(string(b[:size]), " ")
	return server, client, nil
}

func ask(n *link.Namespace, network, from, to string, wait time.Duration) (server, client string, err error) {
	c, err := dial(n, network, from, to, wait)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return say(c, wait)
}

// meets sends requests until each of the servers has answered, and checks that each sees one of the given addresses.
func meets(t *testing.T, n *link.Namespace, network, from, to string, servers map[string]string) {
	t.Helper()
	met := map[string]bool{}
	for range 200 {
		server, client, err := ask(n, network, from, to, patience)
		if err != nil {
			t.Errorf("%s to %s: %v", network, to, err)
			return
		}
		want, found := servers[server]
		if !found || !slices.Contains(strings.Fields(want), client) {
			t.Errorf("%s to %s: %s answers and sees %s; want one of %v", network, to, server, client, servers)
			return
		}
		if met[server] = true; len(met) == len(servers) {
			return
		}
	}
	t.Errorf("%s to %s: only %v answer of %v", network, to, met, servers)
}

// hears checks that nothing answers. If a node drops its own datagram, the sender gets an error.
func hears(t *testing.T, n *link.Namespace, network, from, to string) {
	t.Helper()
	if server, _, err := ask(n, network, from, to, silence); !isTimeout(err) && !errors.Is(err, syscall.EPERM) {
		t.Errorf("%s to %s: %s answers, %v; want silence", network, to, server, err)
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &timeout) && timeout.Timeout()
}

// isRefused checks that the connection is rejected at once.
func isRefused(t *testing.T, n *link.Namespace, network, to string) {
	t.Helper()
	if server, _, err := ask(n, network, "", to, patience); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) {
		t.Errorf("%s to %s: %s answers, %v; want that it is refused", network, to, server, err)
	}
}

func host(addr string, port int) string { return net.JoinHostPort(addr, fmt.Sprint(port)) }

// manyKinds returns Services of all kinds, in both families.
func manyKinds() service.Plan {
	var all []service.Frontend
	for _, f := range families {
		web := to(host(f.far, 8080), host(f.a, 8080), host(f.b, 8080))
		own := to(host(f.a, 8080))
		at := func(format string, n, port int) string { return host(fmt.Sprintf(format, n), port) }
		for _, protocol := range []string{"/TCP", "/UDP"} {
			all = append(all,
				frontend("web", at(f.vip, 1, 80)+protocol, service.ClusterIP, web),
				frontend("web", host(f.any, 30080)+protocol, service.NodePort, web),
				frontend("own", at(f.vip, 2, 80)+protocol, service.ClusterIP, own),
				frontend("empty", at(f.vip, 3, 80)+protocol, service.ClusterIP, service.Backends{}),
				frontend("empty", host(f.any, 30081)+protocol, service.NodePort, service.Backends{}),
				frontend("elsewhere", at(f.vip, 4, 80)+protocol, service.ClusterIP, service.Backends{Drop: true}),
				with(frontend("local", at(f.lb, 1, 80)+protocol, service.LoadBalancer, web), func(x *service.Frontend) { x.Outside = own }),
				with(frontend("local", host(f.any, 30082)+protocol, service.NodePort, web), func(x *service.Frontend) { x.Outside = own }),
				with(frontend("away", at(f.lb, 2, 80)+protocol, service.LoadBalancer, web), func(x *service.Frontend) { x.Outside = service.Backends{Drop: true} }),
				with(frontend("shut", at(f.lb, 3, 80)+protocol, service.LoadBalancer, service.Backends{Drop: true}), func(x *service.Frontend) { x.Outside = own }),
				with(frontend("some", at(f.lb, 4, 80)+protocol, service.LoadBalancer, own), func(x *service.Frontend) {
					x.Sources = []netip.Prefix{netip.PrefixFrom(netip.MustParseAddr(f.out), netip.MustParseAddr(f.out).BitLen())}
				}),
			)
		}
	}
	return plan(all...)
}

func TestServicesWithPackets(t *testing.T) {
	l := newLab(t)
	set(t, l.rules, manyKinds())
	for _, f := range families {
		vip := func(n int) string { return host(fmt.Sprintf(f.vip, n), 80) }
		lb := func(n int) string { return host(fmt.Sprintf(f.lb, n), 80) }
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			t.Run(network, func(t *testing.T) {
				gateway := map[string]string{"4": "169.254.1.1", "6": "2001:db8::10 2001:db8:2::1"}[f.network] // the kernel may choose either
				fromA := map[string]string{f.a: gateway, f.b: f.a, f.far: f.a}
				fromOut := map[string]string{f.a: f.out, f.b: f.out, f.far: f.node}
				meets(t, l.a, network, "", vip(1), fromA)
				meets(t, l.out, network, f.out, vip(1), fromOut)
				meets(t, l.out, network, f.out, host(f.node, 30080), fromOut)
				meets(t, l.a, network, "", host(f.node, 30080), fromA)
				if server, _, err := ask(l.node, network, "", vip(1), patience); err != nil {
					t.Errorf("from the node: %s, %v", server, err)
				}

				meets(t, l.out, network, f.out, lb(1), map[string]string{f.a: f.out})
				meets(t, l.out, network, f.out, host(f.node, 30082), map[string]string{f.a: f.out})
				meets(t, l.b, network, "", lb(1), map[string]string{f.a: f.b, f.b: gateway, f.far: f.b})
				hears(t, l.out, network, f.out, lb(2))
				meets(t, l.b, network, "", lb(2), map[string]string{f.a: f.b, f.b: gateway, f.far: f.b})
				meets(t, l.out, network, f.out, lb(3), map[string]string{f.a: f.out})
				hears(t, l.b, network, "", lb(3))

				meets(t, l.out, network, f.out, lb(4), map[string]string{f.a: f.out})
				hears(t, l.out, network, f.out2, lb(4))
				hears(t, l.b, network, "", lb(4))

				for _, from := range []*link.Namespace{l.a, l.out, l.node} {
					isRefused(t, from, network, vip(3))
					isRefused(t, from, network, host(f.node, 30081))
					hears(t, from, network, "", vip(4))
				}
				if f.loopback == "" {
					return
				}
				isRefused(t, l.node, network, host(f.loopback, 30081))
				for range 20 {
					if server, client, err := ask(l.node, network, "", host(f.loopback, 30080), patience); err != nil || strings.HasPrefix(client, "127.") {
						t.Errorf("by %s: %s sees %s, %v", f.loopback, server, client, err)
					}
				}
			})
		}
	}
}

func TestServicesKeepConnections(t *testing.T) {
	l := newLab(t)
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			t.Run(network, func(t *testing.T) {
				at := fmt.Sprintf(f.vip, 1)
				protocol := map[string]string{"tcp": "/TCP", "udp": "/UDP"}[network[:3]]
				web := frontend("web", host(at, 80)+protocol, service.ClusterIP, to(host(f.a, 8080)))
				moved := with(web, func(x *service.Frontend) { x.Inside, x.Outside = to(host(f.b, 8080)), to(host(f.b, 8080)) })
				set(t, l.rules, plan(web))
				c, err := dial(l.out, network, "", host(at, 80), patience)
				testenv.Must(t, err)
				defer c.Close()
				still := func(after string) {
					t.Helper()
					if server, _, err := say(c, patience); err != nil || server != f.a {
						t.Errorf("after %s: %s answers, %v; want %s", after, server, err, f.a)
					}
				}
				still("the beginning")
				testenv.Must(t, l.rules.ChangeServices([]service.Change{{Service: web.Service, Old: []service.Frontend{web}, New: []service.Frontend{moved}}}))
				still("a change")
				meets(t, l.out, network, f.out, host(at, 80), map[string]string{f.b: f.out})
				set(t, l.rules, plan())
				still("the Service is gone")
				set(t, l.rules, plan(with(web, func(x *service.Frontend) { x.Inside, x.Outside = service.Backends{}, service.Backends{} })))
				still("its endpoints are gone")
				nft(t, l.node, "flush", "table", "inet", ruleset.ServicesTable)
				set(t, l.rules, plan(moved))
				still("the table is made anew")
			})
		}
	}
}

func TestServicesAffinity(t *testing.T) {
	l := newLab(t)
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			t.Run(network, func(t *testing.T) {
				protocol := map[string]string{"tcp": "/TCP", "udp": "/UDP"}[network[:3]]
				left := []string{f.far, f.a, f.b}
				all := func() []service.Frontend {
					var b service.Backends
					for _, a := range left {
						b.Endpoints = append(b.Endpoints, to(host(a, 8080)).Endpoints...)
					}
					var list []service.Frontend
					for _, at := range []string{host(fmt.Sprintf(f.vip, 1), 80), host(fmt.Sprintf(f.vip, 1), 81), host(f.any, 30080)} {
						kind := service.ClusterIP
						if strings.HasSuffix(at, ":30080") {
							kind = service.NodePort
						}
						list = append(list, with(frontend(network, at+protocol, kind, b), func(x *service.Frontend) { x.Affinity = time.Hour }))
					}
					return list
				}
				was := all()
				set(t, l.rules, plan(slices.Clone(was)...))
				clients := []struct {
					in   *link.Namespace
					from string
				}{{l.out, f.out}, {l.out, f.out2}, {l.a, f.a}, {l.b, f.b}}
				met := map[string]string{}
				stays := func(in *link.Namespace, from string) {
					t.Helper()
					for _, at := range []string{host(fmt.Sprintf(f.vip, 1), 80), host(fmt.Sprintf(f.vip, 1), 81), host(f.node, 30080)} {
						for range 5 {
							server, _, err := ask(in, network, from, at, patience)
							testenv.Must(t, err)
							if met[from] == "" {
								met[from] = server
							}
							if server != met[from] || !slices.Contains(left, server) {
								t.Fatalf("%s is sent from %s to %s, by %s", from, met[from], server, at)
							}
						}
					}
				}
				for _, c := range clients {
					stays(c.in, c.from)
				}
				if f.network == "6" { // one from the network outside, and one from the node's own address
					if met[f.out] != met[f.out2] {
						t.Errorf("of one network %s is sent to %s, and %s to %s", f.out, met[f.out], f.out2, met[f.out2])
					}
					list := linktest.Run(t, l.node, "nft", "list", "map", "inet", ruleset.ServicesTable, "affinity6")
					for _, who := range []string{"2001:db8:2:: . ", f.a + " . ", f.b + " . "} {
						if !strings.Contains(list, who) {
							t.Errorf("%s is not remembered:\n%s", who, list)
						}
					}
					if strings.Contains(list, f.out+" . ") {
						t.Errorf("%s is remembered by its address:\n%s", f.out, list)
					}
				}
				for len(left) > 1 {
					gone := met[f.out]
					left = slices.DeleteFunc(slices.Clone(left), func(a string) bool { return a == gone })
					now := all()
					testenv.Must(t, l.rules.ChangeServices([]service.Change{{Service: was[0].Service, Old: was, New: now}}))
					was = now
					for _, c := range clients {
						if met[c.from] == gone {
							met[c.from] = ""
						}
						stays(c.in, c.from) // and clients of other endpoints keep theirs
					}
				}
				// Clients keep their endpoints when new ones come.
				left = []string{f.far, f.a, f.b}
				set(t, l.rules, plan(all()...))
				for _, c := range clients {
					stays(c.in, c.from)
				}
			})
		}
	}
}

// A node that answers NodePorts at 127.0.0.1 routes such addresses. Other hosts must not be able to use them.
func TestServicesKeepLoopback(t *testing.T) {
	l := newLab(t)
	f := families[0]
	set(t, l.rules, plan(frontend("web", "0.0.0.0:30080/UDP", service.NodePort, to(host(f.a, 8081)))))
	testenv.Must(t, l.out.Sysctl("ipv4/conf/all/route_localnet", "1"))
	ip(t, l.out, "addr del 127.0.0.1/8 dev lo", "route add 127.0.0.0/8 via 203.0.113.1")
	var pod net.PacketConn
	testenv.Must(t, l.a.Do(func() (err error) {
		pod, err = net.ListenPacket("udp4", host(f.a, 8081))
		return err
	}))
	defer pod.Close()
	arrives := func(wait time.Duration) error {
		t.Helper()
		c, err := dial(l.out, "udp4", f.out, "127.0.0.1:30080", patience) // each time from another port, so each is a new connection
		testenv.Must(t, err)
		defer c.Close()
		_, err = c.Write([]byte("?"))
		testenv.Must(t, err)
		testenv.Must(t, pod.SetReadDeadline(time.Now().Add(wait)))
		_, _, err = pod.ReadFrom(make([]byte, 10))
		return err
	}
	if err := arrives(silence); !isTimeout(err) {
		t.Errorf("a packet to 127.0.0.1 arrives: %v", err)
	}
	// Without the table's chain the packets pass, so it is the table that drops them.
	nft(t, l.node, "flush", "chain", "inet", ruleset.ServicesTable, "check_prerouting")
	nft(t, l.node, "add", "rule", "inet", ruleset.ServicesTable, "prerouting", "ip daddr 127.0.0.1 udp dport 30080 dnat ip to 10.244.1.2:8081")
	testenv.Must(t, arrives(patience))
}

// TestExternalIPsForPods: at an external IP that a machine outside of the cluster has, a pod reaches the Service, and the node
// reaches the machine.
func TestExternalIPsForPods(t *testing.T) {
	l := newLab(t)
	var all []service.Frontend
	for _, f := range families {
		serve(t, l.out, netip.AddrPortFrom(netip.MustParseAddr(f.out2), 80))
		for _, protocol := range []string{"/TCP", "/UDP"} {
			all = append(all, with(frontend("web", host(f.out2, 80)+protocol, service.ExternalIP, to(host(f.b, 8080))), func(x *service.Frontend) { x.PodsOnly = true }),
				with(frontend("empty", host(f.out, 80)+protocol, service.ExternalIP, service.Backends{}), func(x *service.Frontend) { x.PodsOnly = true }))
		}
		serve(t, l.out, netip.AddrPortFrom(netip.MustParseAddr(f.out), 80))
	}
	set(t, l.rules, plan(all...))
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			if server, _, err := ask(l.a, network, "", host(f.out2, 80), patience); err != nil || server != f.b {
				t.Errorf("a pod by %s: %s answers, %v; want %s", network, server, err, f.b)
			}
			isRefused(t, l.a, network, host(f.out, 80))
			for _, addr := range []string{f.out, f.out2} {
				if server, _, err := ask(l.node, network, "", host(addr, 80), patience); err != nil || server != addr {
					t.Errorf("the node by %s: %s answers, %v; want %s itself", network, server, err, addr)
				}
			}
		}
	}
}
