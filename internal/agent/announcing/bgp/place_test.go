package bgp_test

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

type namespace struct {
	*link.Namespace
	t testing.TB
}

func newNamespace(t testing.TB) namespace {
	t.Helper()
	ns := namespace{linktest.Namespace(t), t}
	ns.run("ip link set lo up")
	ns.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
	return ns
}

func (n namespace) run(command string) string {
	n.t.Helper()
	return linktest.Run(n.t, n.Namespace, strings.Fields(command)...)
}

// wire joins two namespaces, with addresses of both families.
func wire(t testing.TB, a namespace, aDevice string, aAddrs []string, b namespace, bDevice string, bAddrs []string) {
	t.Helper()
	testenv.Must(t, a.SetPair(link.Device{Name: aDevice, Alias: "test"}, b.Namespace, link.Device{Name: bDevice, Alias: "test"}))
	for _, side := range []struct {
		in     namespace
		device string
		addrs  []string
	}{{a, aDevice, aAddrs}, {b, bDevice, bAddrs}} {
		for _, addr := range side.addrs {
			command := "ip addr add " + addr + " dev " + side.device
			if strings.Contains(addr, ":") {
				command += " nodad"
			}
			side.in.run(command)
		}
		side.in.run("ip link set " + side.device + " up")
	}
}

// node is a namespace with a speaker, and a pod behind it.
type node struct {
	namespace
	pod     namespace
	number  int
	command *exec.Cmd
	in      *json.Encoder
	mu      sync.Mutex
	last    told
	sets    int
	log     *testenv.Output
}

// newNode makes node number n, joined to the router: 10.1.N.2 and fd00:1:N::2, with pods in 10.244.N.0/24 and
// fd00:244:N::/64. The router has .1 and ::1.
func newNode(t testing.TB, router namespace, number int) *node {
	t.Helper()
	n := &node{namespace: newNamespace(t), pod: newNamespace(t), number: number, log: &testenv.Output{}}
	at := func(format string) string { return fmt.Sprintf(format, number) }
	wire(t, router, at("node%d"), []string{at("10.1.%d.1/24"), at("fd00:1:%d::1/64")}, n.namespace, "eth0", []string{at("10.1.%d.2/24"), at("fd00:1:%d::2/64")})
	wire(t, n.namespace, "pod", []string{at("10.244.%d.1/24"), at("fd00:244:%d::1/64")}, n.pod, "eth0", []string{at("10.244.%d.2/24"), at("fd00:244:%d::2/64")})
	n.run(at("ip route add default via 10.1.%d.1"))
	n.run(at("ip -6 route add default via fd00:1:%d::1"))
	n.pod.run(at("ip route add default via 10.244.%d.1"))
	n.pod.run(at("ip -6 route add default via fd00:244:%d::1"))
	t.Cleanup(func() {
		if n.command != nil {
			n.end(unix.SIGKILL)
		}
		if t.Failed() {
			t.Logf("speaker of node %d:\n%s", number, tail(n.log.String(), 40))
		}
	})
	return n
}

func tail(s string, lines int) string {
	all := strings.Split(s, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// begin starts the node's speaker.
func (n *node) begin() {
	n.t.Helper()
	self, err := os.Executable()
	testenv.Must(n.t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), asSpeaker+"=1")
	cmd.Stderr = n.log
	in, err := cmd.StdinPipe()
	testenv.Must(n.t, err)
	out, err := cmd.StdoutPipe()
	testenv.Must(n.t, err)
	testenv.Must(n.t, n.Start(cmd))
	n.mu.Lock()
	n.last = told{}
	n.mu.Unlock()
	n.command, n.in = cmd, json.NewEncoder(in)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			var t told
			if json.Unmarshal(lines.Bytes(), &t) != nil {
				continue
			}
			n.mu.Lock()
			if t.Changes == nil {
				t.Changes = n.last.Changes
			} else {
				n.sets++
			}
			n.last = t
			n.mu.Unlock()
		}
	}()
}

// end ends the node's speaker by a signal.
func (n *node) end(signal unix.Signal) {
	n.t.Helper()
	testenv.Must(n.t, n.command.Process.Signal(signal))
	_ = n.command.Wait()
	n.command = nil
}

func (n *node) told() (told, int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last, n.sets
}

// set has the speaker say what is wanted, and returns what that changed.
func (n *node) set(peers ...bgpconf.Peer) bgp.Changes {
	n.t.Helper()
	_, before := n.told()
	testenv.Must(n.t, n.in.Encode(bgpconf.Speaker{RouterID: netip.MustParseAddr(fmt.Sprintf("10.1.%d.2", n.number)), Peers: peers}))
	testenv.Eventually(n.t, "the speaker has answered", func() (bool, string) {
		_, now := n.told()
		return now > before, ""
	})
	t, _ := n.told()
	return *t.Changes
}

// up waits for a session to be up.
func (n *node) up(peer string) {
	n.t.Helper()
	testenv.Eventually(n.t, "session "+peer+" is up", func() (bool, string) {
		t, _ := n.told()
		return slices.ContainsFunc(t.Sessions, func(s bgp.Session) bool { return s.Peer == peer && s.State == bgp.Established }), fmt.Sprint(t.Sessions)
	})
}

// router is a BGP router in a namespace: BIRD or FRR.
type router interface {
	begin(sessions ...routed)
	load(config string)
	end(unix.Signal)
}

// routed is a session as the router has it.
type routed struct {
	address, password string
	ttlSecurity       bool
	device            string // of a link-local address
	extended          bool   // IPv4 with IPv6 next hops
	unnumbered        bool   // whoever is on the link of the device
}

const (
	routerASN = 64500
	nodeASN   = 64512
)

// daemon is a program in a namespace that a test starts and ends.
type daemon struct {
	command *exec.Cmd
	log     testenv.Output
}

func begin(n namespace, program string, args ...string) *daemon {
	n.t.Helper()
	d := &daemon{command: exec.Command(program, args...)}
	d.command.Stdout, d.command.Stderr = &d.log, &d.log
	testenv.Must(n.t, n.Start(d.command))
	return d
}

func (d *daemon) end(t testing.TB, s unix.Signal) {
	t.Helper()
	testenv.Must(t, d.command.Process.Signal(s))
	_ = d.command.Wait()
}

// bird is BIRD 2.
type bird struct {
	namespace
	dir string
	*daemon
}

func newBird(t testing.TB, n namespace) router {
	testenv.NeedFile(t, "/usr/sbin/bird", "apt-get install bird2")
	b := &bird{namespace: n, dir: shortDir(t)}
	t.Cleanup(func() {
		if b.daemon != nil {
			b.end(unix.SIGKILL)
		}
	})
	return b
}

// shortDir is a directory for sockets, whose paths may have 107 bytes.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bgp")
	testenv.Must(t, err)
	testenv.Must(t, os.Chmod(dir, 0o777))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (b *bird) begin(sessions ...routed) {
	b.t.Helper()
	var c strings.Builder
	fmt.Fprintf(&c, "log stderr all;\nrouter id 192.0.2.1;\nprotocol device { scan time 1; }\n")
	for _, family := range []string{"ipv4", "ipv6"} {
		fmt.Fprintf(&c, "protocol kernel { %s { export all; import none; }; merge paths on; scan time 1; }\n", family)
	}
	for i, s := range sessions {
		if s.unnumbered {
			s.address = "range fe80::/10"
			fmt.Fprintf(&c, "protocol radv { interface %q { min ra interval 3; max ra interval 4; }; }\n", s.device)
		}
		fmt.Fprintf(&c, "protocol bgp s%d { local as %d; neighbor %s as %d; passive; debug { states, events };\n", i, routerASN, s.address, nodeASN)
		if s.password != "" {
			fmt.Fprintf(&c, "password %q;\n", s.password)
		}
		if s.ttlSecurity {
			fmt.Fprintf(&c, "ttl security on;\n")
		}
		if s.device != "" {
			fmt.Fprintf(&c, "interface %q;\n", s.device)
		}
		extended := ""
		if s.extended {
			extended = "extended next hop on;"
		}
		if s.unnumbered { // it takes what fails when its own address goes for an error, and would refuse connections for a minute
			fmt.Fprintf(&c, "error wait time 1, 1;\n")
		}
		fmt.Fprintf(&c, "ipv4 { import all; export none; %s }; ipv6 { import all; export none; }; }\n", extended)
	}
	b.load(c.String())
}

// load begins with a configuration.
func (b *bird) load(config string) {
	b.t.Helper()
	path := filepath.Join(b.dir, "bird.conf")
	testenv.Must(b.t, os.WriteFile(path, []byte(config), 0o644))
	b.daemon = begin(b.namespace, "/usr/sbin/bird", "-f", "-c", path, "-s", filepath.Join(b.dir, "bird.ctl"))
}

func (b *bird) end(s unix.Signal) {
	b.t.Helper()
	b.daemon.end(b.t, s)
	if b.t.Failed() {
		b.t.Logf("BIRD:\n%s", tail(b.log.String(), 40))
	}
	b.daemon = nil
}

// frr is FRRouting.
type frr struct {
	namespace
	dir         string
	zebra, bgpd *daemon
}

func newFRR(t testing.TB, n namespace) router {
	testenv.NeedFile(t, "/usr/lib/frr/bgpd", "apt-get install frr")
	f := &frr{namespace: n, dir: shortDir(t)}
	t.Cleanup(func() {
		if f.bgpd != nil {
			f.end(unix.SIGKILL)
		}
	})
	return f
}

func (f *frr) begin(sessions ...routed) {
	f.t.Helper()
	var c strings.Builder
	fmt.Fprintf(&c, "router bgp %d\n bgp router-id 192.0.2.1\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n", routerASN)
	for i, s := range sessions {
		if s.unnumbered { // IPv6 next hops are taken of themselves
			sessions[i].address = s.device
			fmt.Fprintf(&c, " neighbor %s interface remote-as %d\n", s.device, nodeASN)
			continue
		}
		fmt.Fprintf(&c, " neighbor %[1]s remote-as %[2]d\n neighbor %[1]s passive\n", s.address, nodeASN)
		if s.password != "" {
			fmt.Fprintf(&c, " neighbor %s password %s\n", s.address, s.password)
		}
		if s.ttlSecurity {
			fmt.Fprintf(&c, " neighbor %s ttl-security hops 1\n", s.address)
		}
		if s.device != "" {
			fmt.Fprintf(&c, " neighbor %s interface %s\n", s.address, s.device)
		}
		if s.extended {
			fmt.Fprintf(&c, " neighbor %s capability extended-nexthop\n", s.address)
		}
	}
	for _, family := range []string{"ipv4", "ipv6"} {
		fmt.Fprintf(&c, " address-family %s unicast\n", family)
		for _, s := range sessions {
			fmt.Fprintf(&c, "  neighbor %s activate\n", s.address)
		}
		fmt.Fprintf(&c, " exit-address-family\n")
	}
	f.load(c.String())
}

// load begins with a configuration of bgpd.
func (f *frr) load(config string) {
	f.t.Helper()
	path := filepath.Join(f.dir, "bgpd.conf")
	testenv.Must(f.t, os.WriteFile(path, []byte(config), 0o644))
	testenv.Must(f.t, os.WriteFile(filepath.Join(f.dir, "zebra.conf"), nil, 0o644))
	common := func(name string) []string {
		return []string{"-f", filepath.Join(f.dir, name+".conf"), "-i", filepath.Join(f.dir, name+".pid"),
			"-z", filepath.Join(f.dir, "zserv"), "--vty_socket", f.dir, "--log", "stdout", "--log-level", "debug"}
	}
	f.zebra = begin(f.namespace, "/usr/lib/frr/zebra", common("zebra")...)
	f.bgpd = begin(f.namespace, "/usr/lib/frr/bgpd", append(common("bgpd"), "-P", "0")...)
}

func (f *frr) end(s unix.Signal) {
	f.t.Helper()
	f.bgpd.end(f.t, s)
	f.zebra.end(f.t, s)
	if f.t.Failed() {
		f.t.Logf("bgpd:\n%s\nzebra:\n%s", tail(f.bgpd.log.String(), 40), tail(f.zebra.log.String(), 20))
	}
	f.bgpd, f.zebra = nil, nil
}

// routers are those that everything is tried with.
var routers = map[string]func(testing.TB, namespace) router{"BIRD": newBird, "FRR": newFRR}

func peer(address string, routes ...bgpconf.Route) bgpconf.Peer {
	return bgpconf.Peer{
		Name: "router", Address: netip.AddrPortFrom(netip.MustParseAddr(address), 179), ASN: routerASN, LocalASN: nodeASN,
		HoldTime: 9 * time.Second, Keepalive: 3 * time.Second, Hops: 1, RestartTime: 120 * time.Second, Routes: routes,
	}
}

func route(prefix string) bgpconf.Route { return bgpconf.Route{Prefix: netip.MustParsePrefix(prefix)} }

func via(prefix, hop string) bgpconf.Route {
	return bgpconf.Route{Prefix: netip.MustParsePrefix(prefix), NextHop: netip.MustParseAddr(hop)}
}

// hop is a way as ip tells of it. Via is of the other family.
type hop struct {
	Gateway string
	Via     struct{ Host string }
}

// hops returns by what ways the kernel's table has a prefix, sorted.
func (n namespace) hops(prefix string) []string {
	n.t.Helper()
	var list []struct {
		hop
		Nexthops []hop
	}
	family := "-4"
	if strings.Contains(prefix, ":") {
		family = "-6"
	}
	testenv.Must(n.t, json.Unmarshal([]byte(n.run("ip -j "+family+" route show exact "+prefix)), &list))
	var all []string
	for _, r := range list {
		for _, h := range append(r.Nexthops, r.hop) {
			if way := cmp.Or(h.Gateway, h.Via.Host); way != "" {
				all = append(all, way)
			}
		}
	}
	slices.Sort(all)
	return all
}

// routes waits until the kernel's table has a prefix by these ways and no others.
func (n namespace) routes(prefix string, hops ...string) {
	n.t.Helper()
	testenv.Eventually(n.t, fmt.Sprintf("%s goes by %v", prefix, hops), func() (bool, string) {
		have := n.hops(prefix)
		return slices.Equal(have, hops), fmt.Sprint(have)
	})
}

// pings sends packets from one namespace until it is told to stop, and fails the test if one was lost.
func pings(from namespace, to string) (stop func()) {
	from.t.Helper()
	d := begin(from, "ping", "-n", "-q", "-i", "0.01", to)
	from.t.Cleanup(func() { // of a test that failed before it stopped it
		_ = d.command.Process.Kill()
		_ = d.command.Wait()
	})
	return func() {
		from.t.Helper()
		testenv.Must(from.t, d.command.Process.Signal(unix.SIGINT))
		_ = d.command.Wait()
		var sent, received int
		for line := range strings.Lines(d.log.String()) {
			if strings.Contains(line, "packets transmitted") {
				_, _ = fmt.Sscanf(line, "%d packets transmitted, %d received", &sent, &received)
			}
		}
		if sent < 10 || received != sent {
			from.t.Errorf("ping %s: %d sent, %d answered\n%s", to, sent, received, d.log.String())
		}
	}
}

// outside is a namespace behind the router.
func outside(t testing.TB, router namespace) namespace {
	t.Helper()
	o := newNamespace(t)
	wire(t, router, "outside", []string{"10.2.0.1/24", "fd00:2::1/64"}, o, "eth0", []string{"10.2.0.2/24", "fd00:2::2/64"})
	o.run("ip route add default via 10.2.0.1")
	o.run("ip -6 route add default via fd00:2::1")
	return o
}
