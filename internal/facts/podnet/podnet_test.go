package podnet_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, prefix(s))
	}
	return all
}

// node makes a node of words: those with a slash are pod CIDRs, the others addresses.
func node(name string, words ...string) podnet.Node {
	n := podnet.Node{Name: name}
	for _, w := range words {
		if strings.Contains(w, "/") {
			n.PodCIDRs = append(n.PodCIDRs, prefix(w))
		} else {
			n.Addrs = append(n.Addrs, addr(w))
		}
	}
	return n
}

func eth0(addrs ...string) []podnet.Interface {
	return []podnet.Interface{{Name: "eth0", MTU: 1500, Addrs: prefixes(addrs...)}}
}

// The cluster of most cases: a and b on one segment, c behind a router, all with both families.
var (
	a = node("a", "10.201.1.2", "fd00:201:1::2", "10.244.1.0/24", "fd00:10:244:1::/64")
	b = node("b", "10.201.1.3", "fd00:201:1::3", "10.244.2.0/24", "fd00:10:244:2::/64")
	c = node("c", "10.201.2.2", "fd00:201:2::2", "10.244.3.0/24", "fd00:10:244:3::/64")
)

func underlayOfA() []podnet.Interface { return eth0("10.201.1.2/24", "fd00:201:1::2/64") }

func withBlocks(n podnet.Node, blocks ...string) podnet.Node {
	n.Blocks = prefixes(blocks...)
	return n
}

func at(n podnet.Node, second int) podnet.Node {
	n.Created = time.Unix(int64(second), 0)
	return n
}

func TestPlan(t *testing.T) {
	all := []podnet.Node{a, b, c}
	for _, tc := range []struct {
		name     string
		underlay []podnet.Interface
		nodes    []podnet.Node
		config   podnet.Config
	}{
		{name: "auto", nodes: all},
		{name: "auto-one-segment", nodes: []podnet.Node{a, b}},
		{name: "auto-one-segment-standby", nodes: []podnet.Node{a, b}, config: podnet.Config{Standby: true}},
		{name: "direct", nodes: all, config: podnet.Config{Mode: podnet.Direct}},
		{name: "vxlan", nodes: all, config: podnet.Config{Mode: podnet.VXLAN}},
		{name: "vxlan-over-ipv6", nodes: all, config: podnet.Config{Mode: podnet.VXLAN, Underlay: inet.IPv6, Device: "pods0", VNI: 7, Port: 8472}},
		{name: "vxlan-alone", nodes: []podnet.Node{a}, config: podnet.Config{Mode: podnet.VXLAN}},
		{name: "ipv4", underlay: eth0("10.201.1.2/24"), nodes: []podnet.Node{
			node("a", "10.201.1.2", "10.244.1.0/24"), node("b", "10.201.1.3", "10.244.2.0/24"), node("c", "10.201.2.2", "10.244.3.0/24")}},
		{name: "ipv6", underlay: eth0("fd00:201:1::2/64"), nodes: []podnet.Node{
			node("a", "fd00:201:1::2", "fd00:10:244:1::/64"), node("b", "fd00:201:1::3", "fd00:10:244:2::/64"), node("c", "fd00:201:2::2", "fd00:10:244:3::/64")}},
		{name: "dual-stack-pods-on-ipv4-nodes", underlay: eth0("10.201.1.2/24"), nodes: []podnet.Node{
			node("a", "10.201.1.2", "10.244.1.0/24", "fd00:10:244:1::/64"), node("b", "10.201.1.3", "10.244.2.0/24", "fd00:10:244:2::/64")}},
		{name: "blocks", nodes: []podnet.Node{
			node("a", "10.201.1.2", "10.244.1.0/24", "10.244.9.0/26", "10.244.1.64/26"), node("b", "10.201.1.3", "10.244.2.0/24", "10.244.9.64/26")}},
		{name: "pool-blocks", nodes: []podnet.Node{
			withBlocks(at(node("a", "10.201.1.2", "10.244.1.0/24"), 1), "10.50.0.0/26", "10.50.1.7/32", "10.244.3.0/26", "fd50::40/122"),
			withBlocks(at(node("b", "10.201.1.3", "10.244.2.0/24", "fd00:10:244:2::/64"), 2), "10.50.0.64/26", "10.50.1.8/32", "fd50::9/128", "10.50.0.0/28"),
			at(node("c", "10.201.2.2", "10.244.3.0/24"), 3)}},
		{name: "masquerade", nodes: all, config: podnet.Config{NoMasquerade6: true,
			PodRanges: prefixes("10.244.0.0/16"), NonMasquerade: prefixes("172.16.0.0/12", "172.16.1.0/24")}},
		{name: "link-local", nodes: []podnet.Node{a}, config: podnet.Config{LinkLocal: podnet.Metadata}},
		{name: "overlap", nodes: []podnet.Node{at(a, 2), at(b, 3), at(c, 4),
			at(node("young", "10.201.1.4", "10.244.2.128/25", "10.244.7.0/24"), 5), at(node("old", "10.201.1.5", "10.244.3.0/25"), 1)}},
		{name: "invalid", nodes: []podnet.Node{a, b, b,
			node("default", "10.201.1.4", "0.0.0.0/0"), node("link-local", "169.254.1.1", "10.244.5.0/24"),
			node("no-address", "10.244.6.0/24"), node("no-pods", "10.201.1.5"), node("same", "10.201.1.3", "10.244.8.0/24"),
			node("me-too", "10.201.1.2", "10.244.10.0/24"), node("host-bits", "10.201.1.6", "10.244.11.1/24"),
			node("eats-nodes", "10.201.1.7", "10.201.0.0/16"), node("other-family", "fd00:201:2::9", "10.244.12.0/24"),
			{Name: "zero", Addrs: []netip.Addr{{}}, PodCIDRs: []netip.Prefix{{}}}, {},
		}, config: podnet.Config{Device: "a name that is too long", VNI: 1 << 24, MTU: 9000, Underlay: 5, Mode: "bgp", NonMasquerade: prefixes("10.0.0.1/8")}},
		{name: "segment-clash", underlay: append(underlayOfA(), podnet.Interface{Name: "docker0", MTU: 1500, Addrs: prefixes("10.244.2.1/24")}), nodes: all},
		{name: "left-over", underlay: append(underlayOfA(), podnet.Interface{Name: "cni0", MTU: 1450, Addrs: prefixes("10.244.1.1/24", "fd00:10:244:1::1/64")}), nodes: all},
		{name: "address-without-segment", underlay: []podnet.Interface{{Name: "eth0", MTU: 1450, Addrs: prefixes("192.0.2.7/24")},
			{Name: "lo", MTU: 65536, Addrs: prefixes("10.201.1.2/32")}}, nodes: all},
		{name: "address-elsewhere", underlay: eth0("192.0.2.7/24"), nodes: all},
		{name: "by-address", nodes: []podnet.Node{node("known-as", "10.201.1.2", "10.244.1.0/24"), b}},
		{name: "unknown", underlay: eth0("192.0.2.7/24"), nodes: []podnet.Node{b, c}},
		{name: "mtu", nodes: all, config: podnet.Config{MTU: 1400}},
		// Clamped to what the tunnel carries, and told.
		{name: "large-mtu", nodes: all, config: podnet.Config{MTU: 1500}},
		{name: "large-mtu-direct", nodes: []podnet.Node{a, b}, config: podnet.Config{MTU: 9000, Standby: true}},
		{name: "small-mtu", underlay: []podnet.Interface{{Name: "eth0", MTU: 1300, Addrs: prefixes("10.201.1.2/24", "fd00:201:1::2/64")}}, nodes: all},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.underlay == nil {
				tc.underlay = underlayOfA()
			}
			plan, problems := podnet.NewPlan("a", tc.underlay, tc.nodes, tc.config)
			got := plan.String()
			for _, p := range problems {
				got += fmt.Sprintf("problem %s: %s\n", p.Reason, p)
			}
			golden := filepath.Join("testdata", tc.name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%s\nwant (%s; -update rewrites it):\n%s", got, golden, want)
			}
			// The order in which the API lists nodes decides nothing.
			slices.Reverse(tc.nodes)
			again, _ := podnet.NewPlan("a", tc.underlay, tc.nodes, tc.config)
			if again.String() != plan.String() {
				t.Errorf("nodes in another order give another plan:\n%s", again)
			}
		})
	}
}

// cluster is a random one: nodes on segments, some of which are in trouble.
type cluster struct {
	nodes    []podnet.Node
	underlay map[string][]podnet.Interface
	segment  map[string]int
}

func random(r *rand.Rand) cluster {
	cl := cluster{underlay: map[string][]podnet.Interface{}, segment: map[string]int{}}
	segments := 1 + r.IntN(4)
	has4, has6 := r.IntN(4) > 0, r.IntN(2) > 0
	if !has4 {
		has6 = true
	}
	for i := range 1 + r.IntN(30) {
		n := podnet.Node{Name: fmt.Sprintf("n%d", i), Created: time.Unix(int64(r.IntN(20)), 0)}
		segment := r.IntN(segments)
		device := podnet.Interface{Name: "eth0", MTU: 1500}
		add := func(host, pods netip.Prefix) {
			n.Addrs = append(n.Addrs, host.Addr())
			device.Addrs = append(device.Addrs, host)
			n.PodCIDRs = append(n.PodCIDRs, pods)
		}
		range4 := i
		if r.IntN(10) == 0 {
			range4 = r.IntN(30) // maybe another's
		}
		if has4 {
			add(prefix(fmt.Sprintf("10.201.%d.%d/24", segment, i+2)), prefix(fmt.Sprintf("10.244.%d.0/24", range4)))
		}
		if has6 {
			add(prefix(fmt.Sprintf("fd00:201:%x::%x/64", segment, i+2)), prefix(fmt.Sprintf("fd00:244:%x::/64", i)))
		}
		cl.nodes = append(cl.nodes, n)
		cl.underlay[n.Name] = []podnet.Interface{device}
		cl.segment[n.Name] = segment
	}
	return cl
}

func TestPlansFitTogether(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	r := rand.New(rand.NewPCG(seed, 0))
	for range 100 {
		cl := random(r)
		for _, mode := range []podnet.Mode{podnet.Auto, podnet.Direct, podnet.VXLAN} {
			if text := misfit(cl, mode); text != "" {
				t.Fatalf("seed %d, mode %s: %s", seed, mode, text)
			}
		}
	}
}

// misfit says what is wrong with the plans of a cluster's nodes taken together, or nothing.
func misfit(cl cluster, mode podnet.Mode) string {
	plans := map[string]podnet.Plan{}
	for _, n := range cl.nodes {
		plan, problems := podnet.NewPlan(n.Name, cl.underlay[n.Name], cl.nodes, podnet.Config{Mode: mode})
		for _, p := range problems {
			if p.Reason != podnet.Overlap && p.Reason != podnet.NoPodCIDR && p.Reason != podnet.NotOnSegment {
				return fmt.Sprintf("%s: unexpected problem %s", n.Name, p)
			}
		}
		plans[n.Name] = plan
	}
	for _, n := range cl.nodes {
		plan := plans[n.Name]
		routes := map[netip.Prefix]podnet.Route{}
		for _, route := range plan.Routes {
			if _, twice := routes[route.To]; twice {
				return fmt.Sprintf("%s routes %s twice", n.Name, route.To)
			}
			routes[route.To] = route
		}
		wanted := 0
		for _, other := range cl.nodes {
			// What another node routes to itself as unreachable is what it owns.
			for _, own := range plans[other.Name].Routes {
				if !own.Unreachable {
					continue
				}
				sameSegment := cl.segment[n.Name] == cl.segment[other.Name]
				route, routed := routes[own.To]
				if other.Name != n.Name && mode == podnet.Direct && !sameSegment {
					if routed {
						return fmt.Sprintf("%s routes %s, which is behind a router", n.Name, own.To)
					}
					continue
				}
				if other.Name != n.Name && (mode == podnet.VXLAN || !sameSegment) && !slices.ContainsFunc(plan.Routes, func(x podnet.Route) bool {
					return x.Unreachable && x.To.Addr().Is4() == own.To.Addr().Is4()
				}) {
					continue // a node that lost its range of this family has nothing to send from
				}
				if !routed {
					return fmt.Sprintf("%s does not route %s of %s", n.Name, own.To, other.Name)
				}
				wanted++
				if route.Device != podnet.DefaultDevice {
					continue
				}
				back := plans[other.Name]
				if back.Tunnel == nil || plan.Tunnel == nil {
					return fmt.Sprintf("%s reaches %s by a tunnel that is not there", n.Name, other.Name)
				}
				if !slices.Contains(back.Forwards, podnet.Forward{MAC: plan.Tunnel.MAC, To: n.Addrs[0]}) {
					return fmt.Sprintf("%s cannot answer %s: it has no forwarding entry for it", other.Name, n.Name)
				}
				if route.To.Addr().Is4() && !slices.Contains(back.Tunnel.Addrs, route.Via) || !slices.Contains(plan.Neighbours, podnet.Neighbour{Addr: route.Via, MAC: back.Tunnel.MAC}) {
					return fmt.Sprintf("%s sends to %s, which is not the tunnel of %s", n.Name, route, other.Name)
				}
			}
		}
		if wanted != len(plan.Routes) {
			return fmt.Sprintf("%s has %d routes, want %d:\n%s", n.Name, len(plan.Routes), wanted, plan)
		}
	}
	return ""
}

func TestDiff(t *testing.T) {
	nodes := []podnet.Node{a, b, c}
	plan, _ := podnet.NewPlan("a", underlayOfA(), nodes, podnet.Config{})
	if d := podnet.Diff(plan, plan.State); len(d) != 0 {
		t.Errorf("a plan differs from itself: %v", d)
	}
	have, _ := podnet.NewPlan("a", underlayOfA(), nodes, podnet.Config{})
	stray := podnet.Route{To: prefix("10.244.9.0/24"), Via: addr("10.201.1.9"), Device: "eth0"}
	have.Routes = slices.DeleteFunc(have.Routes, func(r podnet.Route) bool { return r.To == prefix("10.244.2.0/24") })
	have.Routes[1].Via = addr("10.244.3.9")
	have.Routes = append(have.Routes, stray)
	have.Neighbours = have.Neighbours[1:]
	have.Forwards[0].To = addr("10.201.2.9")
	have.Tunnel.MTU = 1400
	have.Tunnel.Addrs = have.Tunnel.Addrs[:1]
	have.Sysctls[len(have.Sysctls)-1].Value = "0"
	have.Masquerade.Nodes = have.Masquerade.Nodes[1:]
	var got []string
	for _, d := range podnet.Diff(plan, have.State) {
		got = append(got, d.String())
	}
	text := strings.Join(got, "\n") + "\n"
	golden := "testdata/diff.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, _ := os.ReadFile(golden)
	if text != string(want) {
		t.Errorf("got:\n%s\nwant:\n%s", text, want)
	}
}

func TestTunnelMAC(t *testing.T) {
	one, other := podnet.TunnelMAC("a", 1), podnet.TunnelMAC("a", 2)
	if one == other || one[0]&3 != 2 || one != podnet.TunnelMAC("a", 1) {
		t.Errorf("MAC addresses %s and %s", one, other)
	}
	// It is written into nothing but kernels, yet all nodes must agree on it, whatever version they run.
	if got := podnet.TunnelMAC("east-worker1", podnet.DefaultVNI).String(); got != "7a:82:94:89:c1:50" {
		t.Errorf("the address of east-worker1 changed to %s", got)
	}
}

func FuzzNode(f *testing.F) {
	f.Add("a", "10.201.1.2", "10.244.1.0/24")
	f.Add("b", "fd00::1", "fd00:10:244::/64")
	f.Add("", "::ffff:1.2.3.4", "0.0.0.0/0")
	f.Add("c", "fe80::1%eth0", "255.255.255.254/31")
	f.Fuzz(func(t *testing.T, name, address, cidr string) {
		n, problems := podnet.ParseNode(name, time.Time{}, []string{address}, []string{cidr})
		if len(n.Addrs)+len(n.PodCIDRs)+len(problems) != 2 {
			t.Errorf("%d addresses, %d ranges, %d problems of one each", len(n.Addrs), len(n.PodCIDRs), len(problems))
		}
		for _, mode := range []podnet.Mode{podnet.Auto, podnet.Direct, podnet.VXLAN} {
			for _, self := range []string{"a", name} {
				plan, problems := podnet.NewPlan(self, underlayOfA(), []podnet.Node{a, c, n}, podnet.Config{Mode: mode})
				for _, r := range plan.Routes {
					if r.To.Contains(addr("10.201.1.7")) || r.To.Bits() == 0 {
						t.Errorf("route %s takes the nodes' own network", r)
					}
				}
				if plan.Node == "" && len(problems) == 0 {
					t.Error("neither a plan nor a problem")
				}
			}
		}
	})
}

func BenchmarkPlan(b *testing.B) {
	nodes := many(1000)
	underlay := underlayOfA()
	for b.Loop() {
		podnet.NewPlan("n0", underlay, nodes, podnet.Config{})
	}
}

// many makes nodes of which every other one is behind a router.
func many(count int) []podnet.Node {
	var nodes []podnet.Node
	for i := range count {
		nodes = append(nodes, node(fmt.Sprintf("n%d", i),
			fmt.Sprintf("10.20%d.%d.%d", i%2+1, i/500, i/2%250+2), fmt.Sprintf("fd00:201:%x::%x", i%2+1, i/2+2),
			fmt.Sprintf("10.%d.%d.0/24", 128+i/250, i%250), fmt.Sprintf("fd00:10:244:%x::/64", i)))
	}
	return nodes
}
