package podroute_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// fabric is three nodes with a pod each: a and b on one segment, c on another, and a router between, which knows of
// no pods. Behind the router is a host outside of the cluster.
type fabric struct {
	nodes   []*fabricNode
	outside *link.Namespace
}

type fabricNode struct {
	podnet.Node
	ns, pod *link.Namespace
	rules   *ruleset.Ruleset
}

const (
	outside4, outside6 = "192.0.2.2", "2001:db8::2"
	hostMAC, podMAC    = "02:00:00:00:00:01", "02:00:00:00:00:02"
)

func newFabric(t *testing.T, podMTU int) *fabric {
	t.Helper()
	router := linktest.Namespace(t)
	f := &fabric{outside: linktest.Namespace(t)}
	for _, c := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		testenv.Must(t, router.Sysctl(c, "1"))
	}
	quick := func(n *link.Namespace) {
		t.Helper()
		// Else IPv6 asks for a second whether anyone has its link-local address, and without ::1 Go's net package
		// takes IPv6 for unsupported.
		testenv.Must(t, n.Sysctl("ipv6/conf/default/accept_dad", "0"))
		testenv.Must(t, n.SetUp("lo", true))
	}
	quick(router)
	quick(f.outside)
	wire := func(n *link.Namespace, name, bridge string, addrs []netip.Prefix, gateway ...string) {
		t.Helper()
		testenv.Must(t, router.SetPair(link.Device{Name: name, Alias: "test", Bridge: bridge}, n, link.Device{Name: "eth0", Alias: "test"}))
		testenv.Must(t, n.SetAddrs("eth0", addrs))
		var routes []link.Route
		for _, g := range gateway {
			to := "0.0.0.0/0"
			if strings.Contains(g, ":") {
				to = "::/0"
			}
			routes = append(routes, link.Route{To: netip.MustParsePrefix(to), Via: netip.MustParseAddr(g)})
		}
		testenv.Must(t, n.SetRoutes(routes))
	}
	for i, addrs := range [][]netip.Prefix{prefixes("10.201.1.1/24", "fd00:201:1::1/64"), prefixes("10.201.2.1/24", "fd00:201:2::1/64")} {
		testenv.Must(t, router.SetBridge(link.Device{Name: fmt.Sprintf("br%d", i+1), Alias: "test"}))
		testenv.Must(t, router.SetAddrs(fmt.Sprintf("br%d", i+1), addrs))
	}
	wire(f.outside, "out", "", prefixes(outside4+"/24", outside6+"/64"), "192.0.2.1", "2001:db8::1")
	testenv.Must(t, router.SetAddrs("out", prefixes("192.0.2.1/24", "2001:db8::1/64")))

	for i, segment := range []int{1, 1, 2} {
		ns, path := linktest.NamespaceAt(t)
		n := &fabricNode{ns: ns, pod: linktest.Namespace(t)}
		n.Name = string(rune('a' + i))
		quick(n.ns)
		quick(n.pod)
		host4, host6 := fmt.Sprintf("10.201.%d.%d", segment, i+2), fmt.Sprintf("fd00:201:%d::%d", segment, i+2)
		n.Addrs = []netip.Addr{netip.MustParseAddr(host4), netip.MustParseAddr(host6)}
		n.PodCIDRs = prefixes(fmt.Sprintf("10.244.%d.0/24", i+1), fmt.Sprintf("fd00:10:244:%d::/64", i+1))
		wire(n.ns, "to-"+n.Name, fmt.Sprintf("br%d", segment), prefixes(host4+"/24", host6+"/64"),
			fmt.Sprintf("10.201.%d.1", segment), fmt.Sprintf("fd00:201:%d::1", segment))

		mac := func(s string) net.HardwareAddr { m, _ := net.ParseMAC(s); return m }
		testenv.Must(t, n.ns.SetPair(link.Device{Name: "pod0", Alias: "test", MTU: podMTU, MAC: mac(hostMAC)},
			n.pod, link.Device{Name: "eth0", Alias: "test", MTU: podMTU, MAC: mac(podMAC)}))
		pod4, pod6 := n.podAddr(inet.IPv4), n.podAddr(inet.IPv6)
		testenv.Must(t, n.pod.SetAddrs("eth0", prefixes(pod4+"/32", pod6+"/128")))
		for _, args := range [][]string{
			{"ip", "neigh", "add", "169.254.1.1", "lladdr", hostMAC, "dev", "eth0"},
			{"ip", "neigh", "add", "fe80::1", "lladdr", hostMAC, "dev", "eth0"},
			{"ip", "route", "add", "default", "via", "169.254.1.1", "dev", "eth0", "onlink"},
			{"ip", "-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0"},
		} {
			linktest.Run(t, n.pod, args...)
		}
		for _, args := range [][]string{
			{"ip", "neigh", "add", pod4, "lladdr", podMAC, "dev", "pod0"},
			{"ip", "neigh", "add", pod6, "lladdr", podMAC, "dev", "pod0"},
			{"ip", "route", "add", pod4, "dev", "pod0", "proto", "252"},
			{"ip", "-6", "route", "add", pod6, "dev", "pod0", "proto", "252"},
		} {
			linktest.Run(t, n.ns, args...)
		}
		var err error
		n.rules, err = ruleset.Open(path)
		testenv.Must(t, err)
		t.Cleanup(n.rules.Close)
		f.nodes = append(f.nodes, n)
	}
	return f
}

func (n *fabricNode) podAddr(f inet.Family) string {
	if f == inet.IPv4 {
		return strings.Replace(n.PodCIDRs[0].Addr().String(), ".0", ".7", 1)
	}
	return n.PodCIDRs[1].Addr().String() + "7"
}

// apply puts the plan of each node into its kernel.
func (f *fabric) apply(t *testing.T, config podnet.Config) []podnet.Plan {
	t.Helper()
	return f.applyEach(t, config, config, config)
}

// applyEach is apply with a configuration for each node.
func (f *fabric) applyEach(t *testing.T, configs ...podnet.Config) []podnet.Plan {
	t.Helper()
	var nodes []podnet.Node
	for _, n := range f.nodes {
		nodes = append(nodes, n.Node)
	}
	var plans []podnet.Plan
	for i, n := range f.nodes {
		underlay, err := podroute.Underlay(n.ns)
		testenv.Must(t, err)
		plan, problems := podnet.NewPlan(n.Name, underlay, nodes, configs[i])
		for _, p := range problems {
			if p.Reason != podnet.NotOnSegment {
				t.Fatal(p)
			}
		}
		_, err = n.rules.SetGuard(plan.Guard) // as the agent does: before the tunnel
		testenv.Must(t, err)
		set(t, n.ns, plan)
		_, err = n.rules.SetMasquerade(plan.Masquerade)
		testenv.Must(t, err)
		plans = append(plans, plan)
	}
	return plans
}

// agree fails the test unless every kernel holds its plan, masquerade and all.
func (f *fabric) agree(t *testing.T, plans []podnet.Plan) {
	t.Helper()
	for i, n := range f.nodes {
		have, err := podroute.Read(n.ns, plans[i].Sysctls)
		testenv.Must(t, err)
		have.Masquerade, err = n.rules.Masquerade()
		testenv.Must(t, err)
		have.Guard, err = n.rules.Guard(plans[i].Guard)
		testenv.Must(t, err)
		for _, d := range podnet.Diff(plans[i], have) {
			t.Error(d)
		}
	}
}

func TestPacketsBetweenPods(t *testing.T) {
	f := newFabric(t, 1400) // fits all modes
	for _, tc := range []struct {
		name    string
		config  podnet.Config
		tunnels string // of a, b, c
		reach   string // pairs that do not reach each other
	}{
		{"auto", podnet.Config{}, "yes yes yes", ""},
		{"vxlan", podnet.Config{Mode: podnet.VXLAN}, "yes yes yes", ""},
		{"vxlan over IPv6", podnet.Config{Mode: podnet.VXLAN, Underlay: inet.IPv6}, "yes yes yes", ""},
		{"direct", podnet.Config{Mode: podnet.Direct}, "no no no", "a-c b-c"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			plans := f.apply(t, tc.config)
			f.agree(t, plans)
			var tunnels []string
			for i, from := range f.nodes {
				tunnels = append(tunnels, map[bool]string{true: "yes", false: "no"}[plans[i].Tunnel != nil])
				for _, to := range f.nodes[i+1:] {
					for _, family := range inet.Families {
						err := ping(t, from.pod, to.podAddr(family), 1400, family)
						if apart := strings.Contains(tc.reach, from.Name+"-"+to.Name); apart != (err != nil) {
							t.Errorf("pod of %s to %s of %s: %v", from.Name, to.podAddr(family), to.Name, err)
						}
					}
				}
			}
			if got := strings.Join(tunnels, " "); got != tc.tunnels {
				t.Errorf("tunnels: %s, want %s", got, tc.tunnels)
			}
			// An address that no pod has is refused by its node, and does not go round.
			if out, _ := linktest.Try(f.nodes[0].ns, "ip", "route", "get", "10.244.1.200"); !strings.Contains(out, "No route to host") {
				t.Errorf("an address without a pod: %s", out)
			}
		})
	}
}

// TestModeChangesNodeByNode has nodes of different modes, as while a new configuration reaches one after the other.
func TestModeChangesNodeByNode(t *testing.T) {
	f := newFabric(t, 1400)
	for _, n := range f.nodes { // the strictest that an administrator may have set
		testenv.Must(t, n.ns.Sysctl("ipv4/conf/all/rp_filter", "1"))
		testenv.Must(t, n.ns.Sysctl("ipv4/conf/eth0/rp_filter", "0")) // the greater of both counts
	}
	standby := podnet.Config{Mode: podnet.Direct, Standby: true}
	for _, configs := range [][]podnet.Config{
		{{Mode: podnet.VXLAN}, {}, {}},
		{{Mode: podnet.VXLAN}, standby, {}},
		{standby, {Mode: podnet.VXLAN}, {}},
		{standby, standby, {}},
		{{}, standby, {}},
	} {
		f.agree(t, f.applyEach(t, configs...))
		for _, family := range inet.Families {
			for i, from := range f.nodes[:2] {
				to := f.nodes[1-i]
				if err := ping(t, from.pod, to.podAddr(family), 1400, family); err != nil {
					t.Errorf("modes %v and %v: pod of %s: %v", configs[0].Mode, configs[1].Mode, from.Name, err)
				}
			}
		}
	}
}

// ping sends one packet of that size, not to be divided.
func ping(t *testing.T, from *link.Namespace, to string, size int, f inet.Family) error {
	header := 28
	if f == inet.IPv6 {
		header = 48
	}
	out, err := linktest.Try(from, "ping", "-c1", "-W1", "-M", "do", "-s", strconv.Itoa(size-header), to)
	if err != nil {
		return fmt.Errorf("no answer: %w: %s", err, out)
	}
	return nil
}

func TestMasqueradedPackets(t *testing.T) {
	f := newFabric(t, 1400)
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	serve := func(n *link.Namespace) { start(t, n, "serve", "[::]:8080") }
	for _, n := range []*link.Namespace{f.outside, b.ns, c.ns, b.pod, c.pod} {
		serve(n)
	}
	pod4, pod6 := a.podAddr(inet.IPv4), a.podAddr(inet.IPv6)
	node4, node6 := a.Addrs[0].String(), a.Addrs[1].String()
	everything := prefixes("0.0.0.0/0", "::/0")
	for _, tc := range []struct {
		name   string
		config podnet.Config
		want   map[string]string // the source that a destination sees
	}{
		{"auto", podnet.Config{}, map[string]string{
			outside4: node4, outside6: node6,
			b.podAddr(inet.IPv4): pod4, c.podAddr(inet.IPv6): pod6,
			b.Addrs[0].String(): pod4, b.Addrs[1].String(): pod6,
			c.Addrs[0].String(): node4, c.Addrs[1].String(): node6, // behind a router that knows of no pods
		}},
		{"nodes' range exempt", podnet.Config{NonMasquerade: prefixes("10.201.0.0/16")}, map[string]string{
			outside4: node4, c.Addrs[0].String(): pod4, c.Addrs[1].String(): node6,
		}},
		{"nodes behind vxlan", podnet.Config{Mode: podnet.VXLAN}, map[string]string{
			outside4: node4, b.podAddr(inet.IPv4): pod4, b.podAddr(inet.IPv6): pod6, b.Addrs[0].String(): node4,
		}},
		{"off for IPv6", podnet.Config{NoMasquerade6: true}, map[string]string{outside4: node4, outside6: ""}},
		{"all exempt", podnet.Config{NonMasquerade: everything}, map[string]string{outside4: "", outside6: ""}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.agree(t, f.apply(t, tc.config))
			for to, want := range tc.want {
				cmd := helper("ask", net.JoinHostPort(to, "8080"))
				var out bytes.Buffer
				cmd.Stdout = &out
				testenv.Must(t, a.pod.Start(cmd))
				_ = cmd.Wait()
				// Without masquerade nothing comes back: the router has no route to pods.
				if got := strings.TrimSpace(out.String()); got != want {
					t.Errorf("%s sees %q, want %q", to, got, want)
				}
			}
		})
	}
}

func TestModeChangesUnderTraffic(t *testing.T) {
	f := newFabric(t, 1500) // larger than vxlan carries: the nodes must say so to the pods
	a, b, c := f.nodes[0], f.nodes[1], f.nodes[2]
	f.apply(t, podnet.Config{Mode: podnet.VXLAN})
	var transfers []*transfer
	for _, to := range []*fabricNode{b, c} {
		start(t, to.pod, "serve", "[::]:8080")
		for _, family := range inet.Families {
			address := net.JoinHostPort(to.podAddr(family), "8080")
			cmd := helper("transfer", address)
			x := &transfer{to: address, cmd: cmd}
			stdin, err := cmd.StdinPipe()
			testenv.Must(t, err)
			x.stdin, cmd.Stdout, cmd.Stderr = stdin, &x.out, &x.out
			testenv.Must(t, a.pod.Start(cmd))
			transfers = append(transfers, x)
		}
	}
	time.Sleep(300 * time.Millisecond)
	for _, config := range []podnet.Config{
		{Mode: podnet.Direct}, {Mode: podnet.Auto}, {Mode: podnet.VXLAN}, {Mode: podnet.Auto, Standby: true}, {Mode: podnet.VXLAN, Underlay: inet.IPv6}, {Mode: podnet.Auto},
	} {
		plans := f.apply(t, config)
		f.agree(t, plans)
		time.Sleep(400 * time.Millisecond)
	}
	for _, x := range transfers {
		x.stdin.Close()
		if err := x.cmd.Wait(); err != nil {
			t.Errorf("the connection to %s: %v\n%s", x.to, err, x.out.String())
		}
		t.Logf("%s: %s", x.to, strings.TrimSpace(x.out.String()))
	}
}

type transfer struct {
	to    string
	cmd   *exec.Cmd
	stdin io.Closer
	out   bytes.Buffer
}

// helper is this test program as a client or a server.
func helper(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^TestHelper$")
	cmd.Env = append(os.Environ(), "FATHOM_LINK_HELPER="+strings.Join(args, " "))
	return cmd
}

// start runs a helper until the test ends, and waits until it is ready.
func start(t *testing.T, n *link.Namespace, args ...string) {
	t.Helper()
	cmd := helper(args...)
	out, err := cmd.StdoutPipe()
	testenv.Must(t, err)
	testenv.Must(t, n.Start(cmd))
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%q: %q, %v", args, line, err)
	}
}

// TestHelper is no test, but what helper runs.
func TestHelper(t *testing.T) {
	role, address, ok := strings.Cut(os.Getenv("FATHOM_LINK_HELPER"), " ")
	if !ok {
		t.Skip("is run by other tests")
	}
	if err := map[string]func(string) error{"serve": serve, "ask": ask, "transfer": send}[role](address); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serve tells each client its address, and then sends back what it gets.
func serve(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			from := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
			fmt.Fprintln(conn, from)
			_, _ = io.Copy(conn, conn)
		}()
	}
}

func ask(address string) error {
	conn, err := net.DialTimeout("tcp", address, time.Second)
	if err != nil {
		return nil // says nothing
	}
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	fmt.Print(line)
	return err
}

// send sends, and checks what comes back, until its input ends.
func send(address string) error {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	if _, err := answers.ReadString('\n'); err != nil {
		return err
	}
	ended := make(chan bool)
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(ended) }()
	block, back := bytes.Repeat([]byte("0123456789abcdef"), 1024), make([]byte, 16*1024)
	var count int
	var longest time.Duration
	for {
		begun := time.Now()
		if err := conn.SetDeadline(begun.Add(10 * time.Second)); err != nil {
			return err
		}
		if _, err := conn.Write(block); err != nil {
			return err
		}
		if _, err := io.ReadFull(answers, back); err != nil {
			return err
		}
		if !slices.Equal(block, back) {
			return fmt.Errorf("block %d came back changed", count)
		}
		count++
		longest = max(longest, time.Since(begun))
		select {
		case <-ended:
			fmt.Printf("%d blocks of 16 KiB there and back, the slowest in %s\n", count, longest.Round(time.Millisecond))
			return nil
		case <-time.After(time.Millisecond): // the machine is shared
		}
	}
}
