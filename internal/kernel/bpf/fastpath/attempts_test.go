package fastpath_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// segment is the network of the attempts: nodes a, b and c on a segment, with a tunnel between them, and a host that is not a node.
// Node a has the pods mallory and alice, node b has bob. Node c is compromised.
type segment struct {
	testing.TB
	underlay inet.Family
	a, b, c  *node
	host     *link.Namespace

	mallory, alice, bob pod

	mu      sync.Mutex
	seen    map[int]string     // where attempts arrived, by number
	from    map[int]netip.Addr // the source of those that a program received
	nodes   []podnet.Node
	guarded bool
	rules   map[*node]*ruleset.Ruleset
	sent    []attempt
	raw     int // mallory's device
}

// attempt is a packet that is sent.
type attempt struct {
	what string
	// open says that the packet arrives without the guard. Otherwise the kernel drops it anyway, or it belongs to the other underlay.
	open, honest bool
}

const (
	mallory, alice, bob = 2, 3, 2
	port                = 8080
)

var (
	hostAddr    = [2]netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")}
	loopback    = [2]netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	outside     = [2]netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8:ffff::7")}
	nobody      = [2]netip.Addr{netip.MustParseAddr("10.244.1.99"), netip.MustParseAddr("fd00:10:244:1::99")}
	otherOfNode = [2]netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")} // newNode's, on lo
	fakeMAC     = net.HardwareAddr{2, 9, 9, 9, 9, 9}
)

func nodeAddr(i, f int) netip.Addr {
	return [2]netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), netip.MustParseAddr(fmt.Sprintf("2001:db8::%d", i))}[f]
}

func tunnelAddr(i, f int) netip.Addr {
	return [2]netip.Addr{netip.AddrFrom4([4]byte{10, 244, byte(i), 1}), netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%d::1", i))}[f]
}

// TestLinkLocal: pods send to link-local addresses that are for the node only.
func TestLinkLocal(t *testing.T) {
	metadata, metadata6 := netip.MustParseAddr("169.254.169.254"), netip.MustParseAddr("fd00:ec2::254")
	other, cache := netip.MustParseAddr("169.254.3.4"), netip.MustParseAddr("169.254.20.10")
	for _, programs := range []bool{false, true} {
		s := newSegment(t, inet.IPv4, true, programs)
		testenv.Must(t, s.host.SetAddrs("lo", []netip.Prefix{netip.PrefixFrom(metadata, 32), netip.PrefixFrom(metadata6, 128), netip.PrefixFrom(other, 32)}))
		linktest.Run(t, s.host, "ip", "addr", "add", "fe80::9/64", "dev", "eth0")
		_, err := s.a.SetNodeCacheAddrs([]netip.Addr{cache})
		testenv.Must(t, err)
		ask := func(to netip.Addr, honest bool) {
			s.datagram(s.mallory.Namespace, netip.AddrPortFrom(to, port), s.say(attempt{what: "a pod to " + to.String(), honest: honest}))
		}
		closed := func(list ...netip.Addr) {
			for _, a := range list {
				ask(a, false)
			}
		}
		closed(metadata, metadata6, other, netip.MustParseAddr("fe80::9%eth0"))
		ask(cache, true)
		// The client gets an error at once.
		c, err := dial(s.mallory.Namespace, "udp", metadata, port)
		testenv.Must(t, err)
		_, err = c.Write([]byte("x"))
		testenv.Must(t, err)
		if _, err = c.Read(make([]byte, 1)); !errors.Is(err, unix.EHOSTUNREACH) {
			t.Errorf("a pod that asks for metadata gets %v", err)
		}
		c.Close()
		s.honest()
		// The node itself reaches them.
		s.datagram(s.a.Namespace, netip.AddrPortFrom(metadata, port), s.say(attempt{what: "the node to " + metadata.String(), honest: true}))

		s.guard(podnet.Config{LinkLocal: podnet.Metadata})
		closed(other)
		ask(metadata, true)
		ask(metadata6, true)
		s.honest()
		s.judge(false)
		s.mu.Lock()
		for i, a := range s.sent {
			if a.honest && s.seen[i] == "" {
				t.Errorf("%s does not arrive", a.what)
			}
			if strings.HasPrefix(a.what, "a pod to ") && a.honest && s.seen[i] == "the host" && s.from[i] != nodeAddr(1, 0) && s.from[i] != nodeAddr(1, 1) {
				t.Errorf("%s: from %s, which no cloud knows", a.what, s.from[i])
			}
		}
		s.mu.Unlock()
	}
}

// translation is a proxy's DNAT of NodePorts: 30080 leads to the node's own tunnel, 30081 to the other node's with this node's
// address, and port 4789 to mallory, who has it as a host port.
const translation = `table inet ports {
	chain prerouting { type nat hook prerouting priority -100;
		ip daddr %[1]s udp dport 30080 dnat ip to %[1]s:4789
		ip daddr %[1]s udp dport 30081 meta mark set 0x4000 dnat ip to %[3]s:4789
		ip6 daddr %[2]s udp dport 30080 dnat ip6 to [%[2]s]:4789
		ip6 daddr %[2]s udp dport 30081 meta mark set 0x4000 dnat ip6 to [%[4]s]:4789
	}
	chain postrouting { type nat hook postrouting priority 100; meta mark 0x4000 masquerade; }
}
`

const hostPort = `table inet hostport {
	chain prerouting { type nat hook prerouting priority -100;
		fib daddr type local udp dport 4789 dnat ip to %s
		fib daddr type local udp dport 4789 dnat ip6 to %s
	}
}
`

// newSegment creates a segment, with or without the guard, and with or without the fast path's programs.
func newSegment(t testing.TB, underlay inet.Family, guard, programs bool) *segment {
	t.Helper()
	s := &segment{TB: t, underlay: underlay, guarded: guard, seen: map[int]string{}, from: map[int]netip.Addr{}, rules: map[*node]*ruleset.Ruleset{}}
	wire := linktest.Namespace(t)
	testenv.Must(t, wire.SetBridge(link.Device{Name: "br0", Alias: "test"}))
	join := func(n *link.Namespace, i int, addrs ...netip.Prefix) {
		testenv.Must(t, n.Sysctl("ipv6/conf/default/accept_dad", "0"))
		testenv.Must(t, wire.SetPair(link.Device{Name: fmt.Sprintf("port%d", i), Alias: "test", Bridge: "br0"}, n, link.Device{Name: "eth0", Alias: "test"}))
		testenv.Must(t, n.SetAddrs("eth0", append(addrs, netip.PrefixFrom(nodeAddr(i, 0), 24), netip.PrefixFrom(nodeAddr(i, 1), 64))))
		testenv.Must(t, n.SetUp("eth0", true))
	}
	for i, n := range []**node{&s.a, &s.b, &s.c} {
		*n = newNode(t, string(rune('a'+i)), fastpath.Options{})
		join((*n).Namespace, i+1)
		testenv.Must(t, (*n).SetRoutes([]link.Route{{To: netip.MustParsePrefix("0.0.0.0/0"), Via: hostAddr[0]}, {To: netip.MustParsePrefix("::/0"), Via: hostAddr[1]}}))
		s.nodes = append(s.nodes, podnet.Node{Name: (*n).name, Addrs: []netip.Addr{nodeAddr(i+1, 0), nodeAddr(i+1, 1)},
			PodCIDRs: []netip.Prefix{netip.PrefixFrom(tunnelAddr(i+1, 0), 24).Masked(), netip.PrefixFrom(tunnelAddr(i+1, 1), 64).Masked()}})
	}
	s.host = linktest.Namespace(t)
	testenv.Must(t, s.host.SetUp("lo", true))
	join(s.host, 9)
	for _, n := range []*node{s.a, s.b, s.c} {
		rules, err := ruleset.Open(n.ns)
		testenv.Must(t, err)
		t.Cleanup(rules.Close)
		s.rules[n] = rules
	}
	s.guard(podnet.Config{})
	for i, n := range []*node{s.a, s.b, s.c} {
		switch n {
		case s.a:
			s.mallory, s.alice = n.pod(t, 1, mallory), n.pod(t, 1, alice)
		case s.b:
			s.bob = n.pod(t, 2, bob)
		}
		if programs {
			n.open(t)
			n.set(t)
		}
		// Distributions set 2 for all devices, with which the kernel accepts any source that has a route. The guard must also work
		// with 0.
		testenv.Must(t, n.Sysctl("ipv4/conf/all/rp_filter", map[bool]string{true: "2", false: "0"}[guard]))
		if other := 3 - (i + 1); other > 0 {
			nft(t, n, fmt.Sprintf(translation, nodeAddr(i+1, 0), nodeAddr(i+1, 1), nodeAddr(other, 0), nodeAddr(other, 1)))
		}
	}
	for _, p := range []pod{s.mallory, s.alice, s.bob} {
		n := s.a
		if p.Namespace == s.bob.Namespace {
			n = s.b
		}
		if !guard {
			testenv.Must(t, n.Sysctl("ipv4/conf/"+p.host+"/rp_filter", "0"))
		}
		linktest.Run(t, p.Namespace, "ip", "link", "set", "eth0", "mtu", "1400")
		linktest.Run(t, n.Namespace, "ip", "link", "set", p.host, "mtu", "1400")
	}
	s.watch("alice", s.alice.Namespace)
	s.watch("bob", s.bob.Namespace)
	for name, n := range map[string]*link.Namespace{"node a": s.a.Namespace, "node b": s.b.Namespace, "the host": s.host} {
		s.listen(name, n)
	}
	testenv.Must(t, s.mallory.Do(func() (err error) {
		s.raw, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(s.raw) })
	return s
}

// guard applies a configuration to the nodes.
func (s *segment) guard(config podnet.Config) {
	s.Helper()
	config.Mode, config.Underlay = podnet.VXLAN, s.underlay
	for _, n := range []*node{s.a, s.b, s.c} {
		devices, err := podroute.Underlay(n.Namespace)
		testenv.Must(s, err)
		plan, problems := podnet.NewPlan(n.name, devices, s.nodes, config)
		if len(problems) > 0 {
			s.Fatal(problems)
		}
		_, err = s.rules[n].SetMasquerade(plan.Masquerade)
		testenv.Must(s, err)
		if s.guarded {
			_, err = s.rules[n].SetGuard(plan.Guard)
			testenv.Must(s, err)
		}
		_, err = podroute.Set(n.Namespace, plan)
		testenv.Must(s, err)
		n.plan = fastpath.Plan{Fast: true, Ways: plan.Ways(devices)}
	}
}

func nft(t testing.TB, n *node, rules string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules")
	testenv.Must(t, os.WriteFile(file, []byte(rules), 0o600))
	linktest.Run(t, n.Namespace, "nft", "-f", file)
}

var token = regexp.MustCompile(`attempt:(\d+);`)

// found records the attempts that arrived somewhere.
func (s *segment) found(where string, packet []byte) {
	for _, m := range token.FindAllSubmatch(packet, -1) {
		i, _ := strconv.Atoi(string(m[1]))
		s.mu.Lock()
		s.seen[i] = where
		s.mu.Unlock()
	}
}

// watch records what arrives at a pod's device.
func (s *segment) watch(name string, n *link.Namespace) {
	s.Helper()
	var fd int
	testenv.Must(s, n.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.ETH_P_ALL<<8)
		return err
	}))
	testenv.Must(s, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	s.reading(func() { unix.Close(fd) }, func(b []byte) (int, error) {
		size, from, err := unix.Recvfrom(fd, b, 0)
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype == unix.PACKET_OUTGOING {
			return 0, nil
		}
		return size, err
	}, name)
}

// listen records what reaches a program on a node.
func (s *segment) listen(name string, n *link.Namespace) {
	s.Helper()
	var c net.PacketConn
	testenv.Must(s, n.Do(func() (err error) {
		c, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port))
		return err
	}))
	s.reading(func() { c.Close() }, func(b []byte) (int, error) {
		_ = c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		size, from, err := c.ReadFrom(b)
		if m := token.FindSubmatch(b[:size]); err == nil && m != nil {
			i, _ := strconv.Atoi(string(m[1]))
			s.mu.Lock()
			s.from[i] = from.(*net.UDPAddr).AddrPort().Addr().Unmap()
			s.mu.Unlock()
		}
		return size, err
	}, name)
}

func (s *segment) reading(end func(), read func([]byte) (int, error), name string) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		b := make([]byte, 65536)
		for {
			select {
			case <-done:
				return
			default:
			}
			if size, err := read(b); err == nil {
				s.found(name, b[:size])
			}
		}
	}()
	s.Cleanup(func() { close(done); <-ended; end() })
}

// say returns the payload of a new attempt.
func (s *segment) say(a attempt) []byte {
	s.sent = append(s.sent, a)
	return fmt.Appendf(nil, "attempt:%d;", len(s.sent)-1)
}

// onOne pins the sender to one processor, so that packets arrive in the order in which they are sent.
func onOne(n *link.Namespace, f func() error) error {
	return n.Do(func() error {
		var before, one unix.CPUSet
		if err := unix.SchedGetaffinity(0, &before); err != nil {
			return err
		}
		for i := range 1024 {
			if before.IsSet(i) {
				one.Set(i)
				break
			}
		}
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return err
		}
		defer func() { _ = unix.SchedSetaffinity(0, &before) }()
		return f()
	})
}

// frame sends a raw frame from mallory.
func (s *segment) frame(f []byte) {
	s.Helper()
	testenv.Must(s, onOne(s.mallory.Namespace, func() error {
		device, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		return unix.Sendto(s.raw, f, 0, &unix.SockaddrLinklayer{Ifindex: device.Index})
	}))
}

// datagram sends a datagram by an ordinary socket. The kernel may refuse to.
func (s *segment) datagram(from *link.Namespace, to netip.AddrPort, payload []byte) {
	_ = onOne(from, func() error {
		c, err := net.Dial("udp", to.String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(payload)
		return err
	})
}

// honest sends packets that must arrive, on every path, and waits for them. Everything sent before has arrived by then, or never
// will.
func (s *segment) honest() {
	s.Helper()
	type way struct {
		from *link.Namespace
		to   netip.Addr
	}
	first := len(s.sent)
	for f := range 2 {
		for what, w := range map[string]way{
			"mallory to alice":  {s.mallory.Namespace, s.alice.addrs[f]},
			"mallory to bob":    {s.mallory.Namespace, s.bob.addrs[f]},
			"mallory to node a": {s.mallory.Namespace, nodeAddr(1, f)},
			"mallory to node b": {s.mallory.Namespace, nodeAddr(2, f)},
			"mallory to a host": {s.mallory.Namespace, hostAddr[f]},
			"bob to alice":      {s.bob.Namespace, s.alice.addrs[f]},
			"bob to node a":     {s.bob.Namespace, nodeAddr(1, f)},
			"node c to alice":   {s.c.Namespace, s.alice.addrs[f]},
			"node c to bob":     {s.c.Namespace, s.bob.addrs[f]},
			"node b to alice":   {s.b.Namespace, s.alice.addrs[f]},
			"a host to node a":  {s.host, nodeAddr(1, f)},
			"a host to node b":  {s.host, nodeAddr(2, f)},
		} {
			s.datagram(w.from, netip.AddrPortFrom(w.to, port), s.say(attempt{what: fmt.Sprintf("%s, %s", what, w.to), honest: true}))
		}
	}
	testenv.Eventually(s, "honest packets arrive", func() (bool, string) {
		var missing []string
		s.mu.Lock()
		defer s.mu.Unlock()
		for i, a := range s.sent {
			if _, arrived := s.seen[i]; i >= first && !arrived {
				missing = append(missing, a.what)
			}
		}
		return len(missing) == 0, strings.Join(missing, "; ")
	})
}

// state is what the honest hosts know about their neighbours, routers and routes. It leaves out the node's entries at mallory's own
// device, which affect no other pod. Nodes may learn each other's addresses at any time, but never mallory's for them.
func (s *segment) state() map[string]string {
	s.Helper()
	all := map[string]string{}
	for name, n := range map[string]*link.Namespace{"node a": s.a.Namespace, "node b": s.b.Namespace, "alice": s.alice.Namespace, "bob": s.bob.Namespace} {
		var lines []string
		for _, args := range [][]string{{"neigh"}, {"-6", "neigh"}, {"route", "show", "table", "all"}, {"-6", "route", "show", "table", "all"}, {"-br", "addr"}, {"rule"}, {"-6", "rule"}} {
			for line := range strings.Lines(linktest.Run(s, n, append([]string{"ip"}, args...)...)) {
				words := strings.Fields(line)
				if slices.Contains(words, s.mallory.host) {
					continue
				}
				at := slices.Index(words, "lladdr")
				if slices.Contains(args, "neigh") && !slices.Contains(words, "PERMANENT") && (at < 0 || words[at+1] != s.mallory.mac.String() && words[at+1] != fakeMAC.String()) {
					continue
				}
				lines = append(lines, strings.Join(words, " "))
			}
		}
		slices.Sort(lines)
		all[name] = strings.Join(lines, "\n")
	}
	return all
}

func TestAttempts(t *testing.T) {
	for _, underlay := range inet.Families {
		for _, tc := range []struct {
			name            string
			guard, programs bool
		}{{"open", false, false}, {"rules alone", true, false}, {"rules and programs", true, true}} {
			t.Run(fmt.Sprintf("%s over %s", tc.name, underlay), func(t *testing.T) {
				s := newSegment(t, underlay, tc.guard, tc.programs)
				s.honest()
				before := s.state()
				s.sources()
				s.tunnels()
				s.neighbours()
				s.honest()
				s.judge(!tc.guard)
				if after := s.state(); !maps.Equal(before, after) && tc.guard {
					for name := range before {
						if before[name] != after[name] {
							t.Errorf("%s does not know any more\n%s\nand knows now\n%s", name, lacking(before[name], after[name]), lacking(after[name], before[name]))
						}
					}
				}
				if tc.guard { // a host port with the tunnel's number captures none of its packets
					nft(t, s.a, fmt.Sprintf(hostPort, s.mallory.addrs[0], s.mallory.addrs[1]))
					s.honest()
				}
			})
		}
	}
}

// lacking returns the lines of one text that are not in another.
func lacking(a, b string) string {
	have := strings.Split(b, "\n")
	return strings.Join(slices.DeleteFunc(strings.Split(a, "\n"), func(line string) bool { return slices.Contains(have, line) }), "\n")
}

// judge fails the test if a packet arrived that must not, or did not arrive although it must.
func (s *segment) judge(open bool) {
	s.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, a := range s.sent {
		where, arrived := s.seen[i]
		switch {
		case a.honest:
		case arrived && !open:
			s.Errorf("%s: arrived at %s", a.what, where)
		case !arrived && open && a.open:
			s.Errorf("%s: it does not even arrive where nobody takes care, so that it proves nothing", a.what)
		}
	}
}

// sources sends from mallory with addresses that are not his.
func (s *segment) sources() {
	m, gateway := s.mallory.mac, s.mallory.hostMAC
	for f := range 2 {
		for what, src := range map[string]netip.Addr{
			"alice": s.alice.addrs[f], "bob": s.bob.addrs[f], "no pod": nobody[f], "node a": nodeAddr(1, f), "node b": nodeAddr(2, f),
			"the tunnel's address of a": tunnelAddr(1, f), "the tunnel's address of b": tunnelAddr(2, f), "a host": hostAddr[f], "outside": outside[f],
			"loopback": loopback[f], "nobody": [2]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}[f],
			"a group": [2]netip.Addr{netip.MustParseAddr("224.0.0.9"), netip.MustParseAddr("ff02::9")}[f],
		} {
			for to, dst := range map[string]netip.Addr{"alice": s.alice.addrs[f], "bob": s.bob.addrs[f], "node a": nodeAddr(1, f), "node b": nodeAddr(2, f)} {
				// The kernel itself refuses a source that is its own, or no host's; bob's node has a way back to none of these.
				open := slices.Contains([]string{"alice", "bob", "no pod", "node b", "outside"}, what) && what != to && (to == "alice" || to == "node a")
				a := func(how string, open bool) []byte {
					return s.say(attempt{what: fmt.Sprintf("%s as %s to %s, %s", how, what, to, dst), open: open})
				}
				s.frame(ether(m, gateway, datagram(src, dst, port, a("source", open))))
				s.frame(ether(fakeMAC, gateway, datagram(src, dst, port, a("source and MAC address", open))))
				s.frame(ether(s.alice.mac, gateway, datagram(src, dst, port, a("alice's MAC address", open))))
				// 802.1p: a tag without a number is taken off, and so are several.
				s.frame(ether(m, gateway, datagram(src, dst, port, a("priority tag", open)), [2]uint16{unix.ETH_P_8021Q, 0}))
				s.frame(ether(m, gateway, datagram(src, dst, port, a("two priority tags", false)), [2]uint16{unix.ETH_P_8021AD, 0}, [2]uint16{unix.ETH_P_8021Q, 0}))
				s.frame(ether(m, gateway, datagram(src, dst, port, a("VLAN", false)), [2]uint16{unix.ETH_P_8021Q, 5}))
				s.frame(ether(m, gateway, datagram(src, dst, port, a("QinQ", false)), [2]uint16{unix.ETH_P_8021AD, 5}, [2]uint16{unix.ETH_P_8021Q, 6}))
				if f == 0 {
					route := append([]byte{131, 7, 4}, append(dst.AsSlice(), 0)...) // loose source routing, by node a
					s.frame(ether(m, gateway, ip4(src, nodeAddr(1, 0), unix.IPPROTO_UDP, 0, route, udpTo(src, dst, port, a("source route", false)))))
					s.frame(ether(m, gateway, ip4(src, dst, unix.IPPROTO_UDP, 0, []byte{148, 4, 0, 0}, udpTo(src, dst, port, a("router alert", false)))))
					whole := udpTo(src, dst, port, append(bytes.Repeat([]byte("x"), 16), a("fragments", false)...))
					s.frame(ether(m, gateway, ip4(src, dst, unix.IPPROTO_UDP, 0x2000, nil, whole[:16])))
					s.frame(ether(m, gateway, ip4(src, dst, unix.IPPROTO_UDP, 2, nil, whole[16:])))
					continue
				}
				options := []byte{unix.IPPROTO_UDP, 0, 1, 4, 0, 0, 0, 0}
				s.frame(ether(m, gateway, ip6(src, dst, 0, 64, append(slices.Clone(options), udpTo(src, dst, port, a("hop-by-hop options", false))...))))
				s.frame(ether(m, gateway, ip6(src, dst, 60, 64, append(slices.Clone(options), udpTo(src, dst, port, a("destination options", false))...))))
				for _, kind := range []byte{0, 2, 4} { // source routes of RFC 2460, mobile nodes and segment routing
					header := slices.Concat([]byte{unix.IPPROTO_UDP, 2, kind, 1, 0, 0, 0, 0}, dst.AsSlice())
					s.frame(ether(m, gateway, ip6(src, nodeAddr(1, 1), 43, 64, append(header, udpTo(src, dst, port, a(fmt.Sprintf("routing header %d", kind), false))...))))
				}
				whole := udpTo(src, dst, port, append(bytes.Repeat([]byte("x"), 16), a("fragments", false)...))
				s.frame(ether(m, gateway, ip6(src, dst, 44, 64, append([]byte{unix.IPPROTO_UDP, 0, 0, 1, 0, 0, 0, 9}, whole[:16]...))))
				s.frame(ether(m, gateway, ip6(src, dst, 44, 64, append([]byte{unix.IPPROTO_UDP, 0, 0, 16, 0, 0, 0, 9}, whole[16:]...))))
			}
		}
	}
}

// tunnels sends packets to tunnels from hosts that may not, with sources of others.
func (s *segment) tunnels() {
	under := 0
	if s.underlay == inet.IPv6 {
		under = 1
	}
	inner := func(node string, src, dst netip.Addr, payload []byte) []byte {
		from := podnet.TunnelMAC("c", podnet.DefaultVNI) // its own, a device takes for a loop
		to := podnet.TunnelMAC(node, podnet.DefaultVNI)
		return vxlan(podnet.DefaultVNI, ether(from[:], to[:], datagram(src, dst, port, payload)))
	}
	for outer := range 2 {
		for f := range 2 {
			type target struct {
				node string
				dst  netip.Addr
				to   netip.AddrPort
				open bool
			}
			at := func(a netip.Addr, p uint16) netip.AddrPort { return netip.AddrPortFrom(a, p) }
			group := [2]netip.Addr{netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("ff02::1%eth0")}[outer]
			gateway := [2]netip.Addr{netip.MustParseAddr("169.254.1.1"), netip.MustParseAddr("fe80::1%eth0")}[outer]
			for how, x := range map[string]target{
				"its node":                          {"a", s.alice.addrs[f], at(nodeAddr(1, outer), 4789), true},
				"another address of its node":       {"a", s.alice.addrs[f], at(otherOfNode[outer], 4789), true},
				"the tunnel's address of its node":  {"a", s.alice.addrs[f], at(tunnelAddr(1, outer), 4789), true},
				"another node":                      {"b", s.bob.addrs[f], at(nodeAddr(2, outer), 4789), true},
				"the tunnel's address of another":   {"b", s.bob.addrs[f], at(tunnelAddr(2, outer), 4789), true},
				"a port of its node":                {"a", s.alice.addrs[f], at(nodeAddr(1, outer), 30080), true},
				"a port of its node, to another":    {"b", s.bob.addrs[f], at(nodeAddr(1, outer), 30081), true},
				"a port of another":                 {"b", s.bob.addrs[f], at(nodeAddr(2, outer), 30080), true},
				"a port of another, and back":       {"a", s.alice.addrs[f], at(nodeAddr(2, outer), 30081), true},
				"a group":                           {"a", s.alice.addrs[f], at(group, 4789), outer == 1},
				"the gateway":                       {"a", s.alice.addrs[f], at(gateway, 4789), outer == 1},
				"everybody":                         {"a", s.alice.addrs[f], at(netip.MustParseAddr("255.255.255.255"), 4789), false},
				"its node, and to the node":         {"a", nodeAddr(1, f), at(nodeAddr(1, outer), 4789), true},
				"another node, and to that node":    {"b", nodeAddr(2, f), at(nodeAddr(2, outer), 4789), false},
				"its node, and to another's pod":    {"a", s.bob.addrs[f], at(nodeAddr(1, outer), 4789), false},
				"its node, back to whom it is from": {"a", s.mallory.addrs[f], at(nodeAddr(1, outer), 4789), false},
			} {
				for as, src := range map[string]netip.Addr{"bob": s.bob.addrs[f], "alice": s.alice.addrs[f], "node b": nodeAddr(2, f),
					"the tunnel's address of b": tunnelAddr(2, f), "a host": hostAddr[f], "outside": outside[f]} {
					open := x.open && outer == under && (as == "outside" || x.node == "a" && as == "bob" || x.node == "b" && as == "alice")
					s.datagram(s.mallory.Namespace, x.to, inner(x.node, src, x.dst,
						s.say(attempt{what: fmt.Sprintf("by the tunnel of %s (%s) as %s to %s", how, x.to, as, x.dst), open: open})))
				}
			}
			long := bytes.Repeat([]byte("x"), 3000)
			s.datagram(s.mallory.Namespace, at(nodeAddr(1, outer), 4789), inner("a", s.bob.addrs[f], s.alice.addrs[f],
				append(s.say(attempt{what: "in fragments by the tunnel", open: outer == under && f == 0}), long...)))
			for as, src := range map[string]netip.Addr{"bob": s.bob.addrs[f], "node b": nodeAddr(2, f), "mallory": s.mallory.addrs[f], "outside": outside[f]} {
				to := at(nodeAddr(1, outer), 4789)
				open := outer == under && as != "mallory" && as != "node b"
				s.datagram(s.host, to, inner("a", src, s.alice.addrs[f], s.say(attempt{what: fmt.Sprintf("a host that is no node as %s, %s", as, src), open: open})))
				s.datagram(s.c.Namespace, to, inner("a", src, s.alice.addrs[f], s.say(attempt{what: fmt.Sprintf("node c as %s, %s", as, src), open: open})))
				s.datagram(s.a.Namespace, to, inner("a", src, s.alice.addrs[f], s.say(attempt{what: fmt.Sprintf("a program of node a as %s, %s", as, src), open: open})))
			}
			// Packets that node c may send as itself prove that these would arrive.
			s.datagram(s.c.Namespace, at(nodeAddr(1, under), 4789), inner("a", tunnelAddr(3, f), s.alice.addrs[f],
				s.say(attempt{what: "node c as itself", honest: true})))
		}
	}
}

// neighbours sends false announcements of neighbours, routers and routes from mallory to all hosts.
func (s *segment) neighbours() {
	m, gateway := s.mallory.mac, s.mallory.hostMAC
	everybody := net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	allNodes, linkLocal := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("fe80::ff:fe01:102")
	tags := [][][2]uint16{nil, {{unix.ETH_P_8021Q, 0}}, {{unix.ETH_P_8021Q, 5}}}
	for _, tag := range tags {
		for _, target := range []netip.Addr{s.alice.addrs[1], s.bob.addrs[1], nodeAddr(1, 1), nodeAddr(2, 1), hostAddr[1], netip.MustParseAddr("fe80::1")} {
			for _, src := range []netip.Addr{linkLocal, target, netip.MustParseAddr("fe80::1")} {
				for _, dst := range []netip.Addr{allNodes, netip.MustParseAddr("fe80::1"), nodeAddr(1, 1), s.alice.addrs[1]} {
					to := gateway
					if dst == allNodes {
						to = everybody
					}
					for _, message := range [][]byte{advertisement(target, m), solicitation(target, m), router(netip.MustParseAddr("2001:db8:bad::"), m), redirect6(linkLocal, target)} {
						s.frame(ether(m, to, icmp6(src, dst, message), tag...))
					}
				}
			}
		}
		for _, claimed := range []netip.Addr{s.alice.addrs[0], s.bob.addrs[0], nodeAddr(1, 0), nodeAddr(2, 0), hostAddr[0], netip.MustParseAddr("169.254.1.1")} {
			for _, reply := range []byte{1, 2} {
				f := arp(m, m, claimed, claimed)
				f[21] = reply
				header := slices.Clone(f[:12])
				for _, x := range tag {
					header = append(header, byte(x[0]>>8), byte(x[0]), byte(x[1]>>8), byte(x[1]))
				}
				s.frame(append(header, f[12:]...))
			}
			about := ip4(nodeAddr(1, 0), claimed, unix.IPPROTO_UDP, 0, nil, make([]byte, 8))
			s.frame(ether(m, gateway, redirect4(s.mallory.addrs[0], nodeAddr(1, 0), s.mallory.addrs[0], about), tag...))
			s.frame(ether(m, gateway, redirect4(hostAddr[0], nodeAddr(1, 0), s.mallory.addrs[0], about), tag...))
		}
	}
}
