package podnet_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/testenv/golden"
)

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

// TestPlan: what a node's kernel should hold, for objects as one writes them.
func TestPlan(t *testing.T) {
	golden.Run(t, func(in golden.Objects) string {
		plan := planOf(t, in)
		// The order in which the API lists nodes decides nothing.
		slices.Reverse(in.Nodes)
		if again := planOf(t, in); again != plan {
			t.Errorf("nodes in another order give another plan:\n%s", again)
		}
		return plan
	})
}

// planOf returns the plan of node a and its problems. The ConfigMap devices has what a's kernel says: for each device its MTU
// and addresses. Every IPBlock counts: which of them nodes use is decided elsewhere, and the plan has to cope with any.
func planOf(t *testing.T, in golden.Objects) string {
	config := netconf.Default()
	var underlay []podnet.Interface
	for _, m := range in.ConfigMaps {
		switch m.Name {
		case netconf.ConfigMap:
			var err error
			if config, err = netconf.Parse(m.Data); err != nil {
				t.Fatal(err)
			}
		case "devices":
			for _, name := range slices.Sorted(maps.Keys(m.Data)) {
				words := strings.Fields(m.Data[name])
				mtu, err := strconv.Atoi(words[1])
				if err != nil || words[0] != "mtu" {
					t.Fatalf("device %s: %q: want mtu NUMBER ADDRESS…", name, m.Data[name])
				}
				underlay = append(underlay, podnet.Interface{Name: name, MTU: mtu, Addrs: prefixes(words[2:]...)})
			}
		default:
			t.Fatalf("ConfigMap %s is of no use here", m.Name)
		}
	}
	var blocks []ippool.Block
	for _, b := range in.IPBlocks {
		blocks = append(blocks, ippool.Block{Prefix: prefix(b.Spec.CIDR), Node: b.Spec.Node, Pool: b.Spec.Pool})
	}
	f := netfacts.Read(in.Nodes, "a", config).WithBlocks(blocks)
	plan, problems := podnet.NewPlan("a", underlay, f.Nodes, f.Config)
	return text(plan, append(problems, f.Problems...))
}

func text(plan podnet.Plan, problems []podnet.Problem) string {
	b := strings.Builder{}
	b.WriteString(plan.String())
	for _, p := range problems {
		fmt.Fprintf(&b, "problem %s: %s\n", p.Reason, p)
	}
	return b.String()
}

// TestPlanOfConfig: what no setting of the ConfigMap says, and what is wrong with a configuration that none accepts.
func TestPlanOfConfig(t *testing.T) {
	for name, config := range map[string]podnet.Config{
		"vxlan-over-ipv6": {Mode: podnet.VXLAN, Underlay: inet.IPv6, Device: "pods0", VNI: 7, Port: 8472},
		"masquerade":      {NoMasquerade6: true, PodRanges: prefixes("10.244.0.0/16"), NonMasquerade: prefixes("172.16.0.0/12", "172.16.1.0/24")},
		"invalid":         {Device: "a name that is too long", VNI: 1 << 24, MTU: 9000, Underlay: 5, Mode: "bgp", NonMasquerade: prefixes("10.0.0.1/8")},
	} {
		t.Run(name, func(t *testing.T) {
			nodes := []podnet.Node{a, b, c}
			if name == "invalid" { // of which the API has none
				nodes = append(nodes, podnet.Node{Name: "zero", Addrs: []netip.Addr{{}}, PodCIDRs: []netip.Prefix{{}}}, podnet.Node{})
			}
			plan, problems := podnet.NewPlan("a", underlayOfA(), nodes, config)
			golden.Compare(t, text(plan, problems), "testdata/config-"+name+".txt")
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
	golden.Compare(t, strings.Join(got, "\n")+"\n", "testdata/diff.txt")
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
