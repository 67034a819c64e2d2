package fastpath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// node is a namespace that stands for a node, with a bpffs of its own.
type node struct {
	*link.Namespace
	name string
	ns   string // the namespace's path
	dir  string
	path *fastpath.Path
	plan fastpath.Plan
	opts fastpath.Options
}

// A rule set as kube-proxy's: what conntrack holds to be invalid is dropped, and connections are tracked at all.
const rules = `table inet proxy {
	chain forward { type filter hook forward priority 0; ct state invalid counter drop; }
	set self { type ipv4_addr . ipv4_addr; }
	chain prerouting { type nat hook prerouting priority -100;
		ip daddr 10.96.0.1 tcp dport 80 dnat ip to %s:8080
		ip daddr 10.96.0.1 udp dport 80 dnat ip to %s:8080
		ip6 daddr fd00:96::1 tcp dport 80 dnat ip6 to [%s]:8080
	}
	chain postrouting { type nat hook postrouting priority 100; ct status dnat ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 ip saddr . ip daddr @self masquerade; }
}`

func newNode(t testing.TB, name string, opts fastpath.Options) *node {
	t.Helper()
	n := &node{name: name, dir: t.TempDir(), opts: opts}
	n.Namespace, n.ns = linktest.NamespaceAt(t)
	testenv.Must(t, n.SetUp("lo", true))
	testenv.Must(t, n.SetAddrs("lo", []netip.Prefix{netip.MustParsePrefix("198.51.100.1/32"), netip.MustParsePrefix("2001:db8:1::1/128")}))
	testenv.Must(t, unix.Mount("bpf", n.dir, "bpf", 0, ""))
	t.Cleanup(func() { testenv.Must(t, unix.Unmount(n.dir, unix.MNT_DETACH)) })
	n.opts.Dir = filepath.Join(n.dir, "fathom")
	n.plan.Fast = true
	return n
}

func (n *node) open(t testing.TB) {
	t.Helper()
	var err error
	n.path, err = fastpath.Open(n.Namespace, n.opts)
	var unsupported *bpf.UnsupportedError
	if errors.As(err, &unsupported) {
		t.Skip(err)
	}
	testenv.Must(t, err)
	t.Cleanup(func() { n.path.Close() })
}

func (n *node) set(t testing.TB) fastpath.Changes {
	t.Helper()
	c, err := n.path.Set(n.plan)
	testenv.Must(t, err)
	d, err := n.path.Check(n.plan)
	if err != nil || len(d) > 0 {
		t.Fatalf("after Set: %v, %v", d, err)
	}
	return c
}

// proxy gives the node Services whose only endpoint is the pod.
func (n *node) proxy(t testing.TB, to pod) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules")
	testenv.Must(t, os.WriteFile(file, fmt.Appendf(nil, rules, to.addrs[0], to.addrs[0], to.addrs[1]), 0o600))
	linktest.Run(t, n.Namespace, "nft", "-f", file)
}

// counts returns them once no more packets come: the last ones of a connection may be on their way still.
func (n *node) counts(t testing.TB) map[string]uint64 {
	t.Helper()
	var m map[string]uint64
	testenv.Eventually(t, "no more packets come", func() (bool, string) {
		before := m
		m = map[string]uint64{}
		list, err := n.path.Counts()
		testenv.Must(t, err)
		for _, c := range list {
			m[c.Verdict+" "+c.Reason] = c.Packets
		}
		return maps.Equal(before, m), fmt.Sprint(m)
	})
	return m
}

// counted returns what a function adds to the counts, which must be something.
func (n *node) counted(t testing.TB, f func()) map[string]uint64 {
	t.Helper()
	before := n.counts(t)
	f()
	var after map[string]uint64
	testenv.Eventually(t, "packets are counted", func() (bool, string) {
		after = n.counts(t)
		return !maps.Equal(before, after), fmt.Sprint(after)
	})
	for k := range after {
		if after[k] -= before[k]; after[k] == 0 {
			delete(after, k)
		}
	}
	return after
}

type pod struct {
	*link.Namespace
	addrs   []netip.Addr
	host    string
	mac     net.HardwareAddr
	hostMAC net.HardwareAddr
	index   int
}

// pod makes pod number i of the node's range.
func (n *node) pod(t testing.TB, block, i int) pod {
	t.Helper()
	p := pod{Namespace: linktest.Namespace(t), host: fmt.Sprintf("pod-%d-%d", block, i),
		addrs: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.244.%d.%d", block, i)), netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%d::%d", block, i))},
		mac:   net.HardwareAddr{2, 0, 0, 1, byte(block), byte(i)}, hostMAC: net.HardwareAddr{2, 0, 0, 2, byte(block), byte(i)}}
	testenv.Must(t, podlink.Add(n.Namespace, p.Namespace, podlink.Pod{Device: "eth0", MAC: p.mac, HostDevice: p.host, HostMAC: p.hostMAC, Alias: "test", MTU: 1500, Addrs: p.addrs}))
	var err error
	p.index, _, err = n.Index(p.host)
	testenv.Must(t, err)
	return p
}

// twoNodes are on a segment, each with two pods.
func twoNodes(t testing.TB, mode podnet.Mode, opts fastpath.Options) (a, b *node, pods [2][2]pod) {
	t.Helper()
	a, b = newNode(t, "a", opts), newNode(t, "b", opts)
	testenv.Must(t, a.SetPair(link.Device{Name: "eth0", Alias: "x"}, b.Namespace, link.Device{Name: "eth0", Alias: "x"}))
	var nodes []podnet.Node
	for i, n := range []*node{a, b} {
		addrs := []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i+1)), netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i+1))}
		testenv.Must(t, n.SetAddrs("eth0", addrs))
		testenv.Must(t, n.SetUp("eth0", true))
		nodes = append(nodes, podnet.Node{Name: n.name, Addrs: []netip.Addr{addrs[0].Addr(), addrs[1].Addr()},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i+1)), netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", i+1))}})
	}
	for i, n := range []*node{a, b} {
		underlay, err := podroute.Underlay(n.Namespace)
		testenv.Must(t, err)
		plan, problems := podnet.NewPlan(n.name, underlay, nodes, podnet.Config{Mode: mode})
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		_, err = podroute.Set(n.Namespace, plan)
		testenv.Must(t, err)
		n.plan = fastpath.Plan{Fast: true, Ways: plan.Ways(underlay)}
		for j := range 2 {
			pods[i][j] = n.pod(t, i+1, j+2)
			linktest.Run(t, pods[i][j].Namespace, "ip", "link", "set", "eth0", "mtu", fmt.Sprint(plan.PodMTU))
			linktest.Run(t, n.Namespace, "ip", "link", "set", pods[i][j].host, "mtu", fmt.Sprint(plan.PodMTU))
		}
		n.open(t)
		n.set(t)
	}
	for _, n := range []*node{a, b} {
		n.proxy(t, pods[1][0])
	}
	return a, b, pods
}

// serve echoes what it gets by TCP and UDP on port 8080 of each address.
func serve(t testing.TB, p pod) {
	t.Helper()
	for _, a := range p.addrs {
		var l net.Listener
		var u net.PacketConn
		testenv.Must(t, p.Do(func() error {
			var err error
			if l, err = net.Listen("tcp", netip.AddrPortFrom(a, 8080).String()); err != nil {
				return err
			}
			u, err = net.ListenPacket("udp", netip.AddrPortFrom(a, 8080).String())
			return err
		}))
		t.Cleanup(func() { l.Close(); u.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(c, c); c.Close() }()
			}
		}()
		go func() {
			b := make([]byte, 65536)
			for {
				size, from, err := u.ReadFrom(b)
				if err != nil {
					return
				}
				_, _ = u.WriteTo(b[:size], from)
			}
		}()
	}
}

func dial(from *link.Namespace, network string, to netip.Addr, port uint16) (net.Conn, error) {
	var c net.Conn
	err := from.Do(func() error {
		var err error
		c, err = net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), 5*time.Second)
		return err
	})
	if err == nil {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	}
	return c, err
}

// echo sends size bytes and wants them back.
func echo(from *link.Namespace, network string, to netip.Addr, port uint16, size int) error {
	c, err := dial(from, network, to, port)
	if err != nil {
		return err
	}
	defer c.Close()
	data := bytes.Repeat([]byte("fathom! "), size/8+1)[:size]
	sent := make(chan error, 1)
	go func() { _, err := c.Write(data); sent <- err }()
	got := make([]byte, size)
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("%s %s: read: %w", network, to, err)
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("%s %s: other bytes come back", network, to)
	}
	if err := <-sent; err != nil || network != "tcp" {
		return err
	}
	// Its end, too: packets of a connection that is being closed would be counted as somebody else's.
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	if _, err := c.Read(got); err != io.EOF {
		return fmt.Errorf("%s %s: more than was sent, or an error, comes back: %v", network, to, err)
	}
	return nil
}

// invalid is how many packets the rules dropped since conntrack held them to be invalid.
func (n *node) invalid(t testing.TB) string {
	t.Helper()
	for line := range strings.Lines(linktest.Run(t, n.Namespace, "nft", "list", "chain", "inet", "proxy", "forward")) {
		if strings.Contains(line, "invalid") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

func (n *node) noneInvalid(t testing.TB) {
	t.Helper()
	if line := n.invalid(t); !strings.Contains(line, "packets 0 ") {
		t.Errorf("node %s: %s", n.name, line)
	}
}

// ttl sends a packet and returns the TTL that it arrives with.
func ttl(t testing.TB, from, to pod, family int) int {
	t.Helper()
	var c net.PacketConn
	testenv.Must(t, to.Do(func() error {
		var err error
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(to.addrs[family], 9999).String())
		return err
	}))
	defer c.Close()
	raw, err := c.(*net.UDPConn).SyscallConn()
	testenv.Must(t, err)
	testenv.Must(t, raw.Control(func(fd uintptr) {
		if family == 0 {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTTL, 1)
		} else {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1)
		}
	}))
	testenv.Must(t, err)
	s, err := dial(from.Namespace, "udp", to.addrs[family], 9999)
	testenv.Must(t, err)
	defer s.Close()
	_, err = s.Write([]byte("x"))
	testenv.Must(t, err)
	testenv.Must(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	b, oob := make([]byte, 16), make([]byte, 128)
	_, size, _, _, err := c.(*net.UDPConn).ReadMsgUDP(b, oob)
	testenv.Must(t, err)
	messages, err := unix.ParseSocketControlMessage(oob[:size])
	if err != nil || len(messages) != 1 {
		t.Fatal(messages, err)
	}
	return int(messages[0].Data[0])
}

// has fails unless all of the reasons were counted.
func has(t testing.TB, what string, counts map[string]uint64, reasons ...string) {
	t.Helper()
	for _, r := range reasons {
		if counts[r] == 0 {
			t.Errorf("%s: no %q in %v", what, r, counts)
		}
	}
}

func hasNot(t testing.TB, what string, counts map[string]uint64, reasons ...string) {
	t.Helper()
	for _, r := range reasons {
		if counts[r] != 0 {
			t.Errorf("%s: %q in %v", what, r, counts)
		}
	}
}

func TestSameNode(t *testing.T) {
	for _, noTCX := range []bool{false, true} {
		t.Run(fmt.Sprintf("clsact=%v", noTCX), func(t *testing.T) {
			n := newNode(t, "a", fastpath.Options{NoTCX: noTCX})
			a, b := n.pod(t, 1, 2), n.pod(t, 1, 3)
			n.proxy(t, b)
			n.open(t)
			if c := n.set(t); c.Total() == 0 {
				t.Error("nothing changed")
			}
			if c := n.set(t); c.Total() != 0 {
				t.Errorf("a second time: %v", c)
			}
			serve(t, b)
			for family, to := range b.addrs {
				c := n.counted(t, func() {
					testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 1<<20))
					testenv.Must(t, echo(a.Namespace, "udp", to, 8080, 1000))
					if got := ttl(t, a, b, family); got != 63 {
						t.Errorf("TTL %d, want 63", got)
					}
				})
				has(t, "to "+to.String(), c, "redirected to_pod")
				hasNot(t, "to "+to.String(), c, "stack tracked", "stack mtu", "dropped source", "dropped mac")
				c = n.counted(t, func() {
					linktest.Run(t, a.Namespace, "ping", "-c1", "-W2", "-s", "4000", to.String())
					testenv.Must(t, echo(a.Namespace, "udp", to, 8080, 4000))
				})
				has(t, "fragments", c, "stack fragment")
				service := []string{"10.96.0.1", "fd00:96::1"}[family]
				c = n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", netip.MustParseAddr(service), 80, 1<<20)) })
				has(t, "Service", c, "stack tracked", "stack elsewhere")
				hasNot(t, "Service", c, "redirected to_pod")
				linktest.Run(t, n.Namespace, "ping", "-c1", "-W2", to.String()) // the node itself
				testenv.Must(t, echo(n.Namespace, "tcp", to, 8080, 10000))
				refused(t, n, a, to, "redirected to_pod")
			}
			testenv.Must(t, echo(a.Namespace, "udp", netip.MustParseAddr("10.96.0.1"), 80, 1000))
			// A pod to itself by way of a Service: the packet comes back with the pod's own address but for masquerade.
			linktest.Run(t, n.Namespace, "nft", "add", "element", "inet", "proxy", "self", "{ 10.244.1.3 . 10.244.1.3 }")
			testenv.Must(t, echo(b.Namespace, "tcp", netip.MustParseAddr("10.96.0.1"), 80, 10000))
			n.noneInvalid(t)

			testenv.Must(t, fastpath.Remove(n.Namespace, n.opts.Dir))
			for _, to := range b.addrs {
				testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000))
			}
			if out := linktest.Run(t, n.Namespace, "tc", "qdisc", "show"); strings.Contains(out, "clsact") {
				t.Errorf("left behind: %s", out)
			}
			if _, err := os.Stat(n.opts.Dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("left behind: %s, %v", n.opts.Dir, err)
			}
		})
	}
}

// refused sends to a port that nobody listens on: the error that comes back is of a connection that conntrack has not
// seen, and all the same not invalid.
func refused(t testing.TB, n *node, from pod, to netip.Addr, how string) {
	t.Helper()
	c := n.counted(t, func() {
		s, err := dial(from.Namespace, "udp", to, 7777)
		testenv.Must(t, err)
		defer s.Close()
		_, err = s.Write([]byte("x"))
		testenv.Must(t, err)
		testenv.Must(t, s.SetDeadline(time.Now().Add(3*time.Second)))
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("UDP to a closed port of %s: %v", to, err)
		}
	})
	has(t, "refused", c, how)
}

func TestTwoNodes(t *testing.T) {
	for _, mode := range []podnet.Mode{podnet.Direct, podnet.VXLAN} {
		for _, noTCX := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s clsact=%v", mode, noTCX), func(t *testing.T) {
				a, b, pods := twoNodes(t, mode, fastpath.Options{NoTCX: noTCX})
				from, to := pods[0][0], pods[1][0]
				serve(t, to)
				for family, addr := range to.addrs {
					ca, cb := a.counts(t), b.counts(t)
					testenv.Must(t, echo(from.Namespace, "tcp", addr, 8080, 1<<20))
					testenv.Must(t, echo(from.Namespace, "udp", addr, 8080, 1000))
					if got := ttl(t, from, to, family); got != 62 {
						t.Errorf("TTL %d, want 62", got)
					}
					for n, before := range map[*node]map[string]uint64{a: ca, b: cb} {
						after := n.counts(t)
						if after["redirected to_node"] == before["redirected to_node"] || after["redirected from_node"] == before["redirected from_node"] ||
							after["stack tracked"] != before["stack tracked"] || after["stack mtu"] != before["stack mtu"] {
							t.Errorf("node %s: %v\n%v", n.name, before, after)
						}
					}
					linktest.Run(t, from.Namespace, "ping", "-c1", "-W2", "-s", "4000", addr.String())
					testenv.Must(t, echo(from.Namespace, "udp", addr, 8080, 4000))
					service := netip.MustParseAddr([]string{"10.96.0.1", "fd00:96::1"}[family])
					c := a.counted(t, func() { testenv.Must(t, echo(from.Namespace, "tcp", service, 80, 1<<20)) })
					has(t, "Service", c, "stack tracked")
					hasNot(t, "Service", c, "redirected from_node")
					testenv.Must(t, echo(a.Namespace, "tcp", addr, 8080, 10000)) // from another node itself
					testenv.Must(t, echo(pods[1][1].Namespace, "tcp", service, 80, 10000))
					refused(t, a, from, addr, "redirected from_node")
				}
				smallMTU(t, b, from, to)
				a.noneInvalid(t)
				b.noneInvalid(t)
			})
		}
	}
}

// smallMTU makes the last devices on the way smaller than the others: the stack answers, and the answer gets there. Both ends
// of the pod's pair are made so, as a smaller one drops what the other sends; the pod goes on to ask for large segments.
func smallMTU(t testing.TB, n *node, from, to pod) {
	t.Helper()
	linktest.Run(t, n.Namespace, "ip", "link", "set", to.host, "mtu", "1300")
	linktest.Run(t, to.Namespace, "ip", "link", "set", "eth0", "mtu", "1300")
	for _, family := range []string{"-4", "-6"} {
		route := strings.Fields(linktest.Run(t, to.Namespace, "ip", family, "route", "show", "default"))
		linktest.Run(t, to.Namespace, slices.Concat([]string{"ip", family, "route", "replace"}, route, []string{"advmss", "1440"})...)
	}
	for _, addr := range to.addrs {
		c := n.counted(t, func() { testenv.Must(t, echo(from.Namespace, "tcp", addr, 8080, 1<<20)) })
		has(t, "too big", c, "stack mtu")
	}
}

func TestSmallMTU(t *testing.T) {
	n := newNode(t, "a", fastpath.Options{})
	a, b := n.pod(t, 1, 2), n.pod(t, 1, 3)
	n.proxy(t, b)
	n.open(t)
	n.set(t)
	serve(t, b)
	smallMTU(t, n, a, b)
	n.noneInvalid(t)
}

// TestFree: where policies isolate pods, only those take the fast path that are known to be free, also of pods that are new.
func TestFree(t *testing.T) {
	n := newNode(t, "a", fastpath.Options{})
	a, b, c := n.pod(t, 1, 2), n.pod(t, 1, 3), n.pod(t, 1, 4)
	n.plan.Free = map[netip.Addr]bool{}
	for _, p := range []pod{a, b} {
		for _, addr := range p.addrs {
			n.plan.Free[addr] = true
		}
	}
	n.open(t)
	n.set(t)
	serve(t, b)
	serve(t, c)
	for i, to := range b.addrs {
		has(t, to.String(), n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000)) }), "redirected to_pod")
		counts := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", c.addrs[i], 8080, 10000)) })
		has(t, c.addrs[i].String(), counts, "stack pod")
		hasNot(t, c.addrs[i].String(), counts, "redirected to_pod")
	}
	n.plan.Free = nil
	n.set(t)
	has(t, "without policies", n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", c.addrs[0], 8080, 10000)) }), "redirected to_pod")
}

func TestShapedAndSlow(t *testing.T) {
	n := newNode(t, "a", fastpath.Options{})
	a, b, c := n.pod(t, 1, 2), n.pod(t, 1, 3), n.pod(t, 1, 4)
	n.proxy(t, b)
	n.plan.Slow = map[netip.Addr]pin.Stack{c.addrs[0]: pin.Policy, c.addrs[1]: pin.Policy}
	n.open(t)
	serve(t, b)
	serve(t, c)
	tc := func(args string) {
		t.Helper()
		linktest.Run(t, n.Namespace, append([]string{"tc"}, strings.Fields(args)...)...)
	}
	const match = " protocol ip pref 7 u32 match u32 0 0 flowid 1:1"
	for _, shape := range []struct{ name, add, then, del string }{
		{"tbf", "qdisc add dev %s root tbf rate 100mbit burst 1mb latency 50ms", "", "qdisc del dev %s root"},
		{"ingress", "qdisc add dev %s ingress", "", "qdisc del dev %s ingress"},
		{"filter on its way in", "qdisc add dev %s clsact", "filter add dev %s ingress" + match, "filter del dev %s ingress pref 7"},
		{"filter on its way out", "qdisc replace dev %s clsact", "filter add dev %s egress" + match, "filter del dev %s egress pref 7"},
	} {
		tc(fmt.Sprintf(shape.add, b.host))
		if shape.then != "" {
			tc(fmt.Sprintf(shape.then, b.host))
		}
		n.set(t)
		for _, to := range append(slices.Clone(b.addrs), c.addrs...) {
			counts := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", to, 8080, 10000)) })
			has(t, shape.name+", "+to.String(), counts, "stack pod")
			hasNot(t, shape.name+", "+to.String(), counts, "redirected to_pod")
		}
		tc(fmt.Sprintf(shape.del, b.host))
		n.set(t)
		counts := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", b.addrs[0], 8080, 10000)) })
		has(t, "no longer "+shape.name, counts, "redirected to_pod")
	}
	n.plan.Fast = false
	n.set(t)
	counts := n.counted(t, func() { testenv.Must(t, echo(a.Namespace, "tcp", b.addrs[0], 8080, 10000)) })
	hasNot(t, "off", counts, "redirected to_pod")
	n.noneInvalid(t)
}
