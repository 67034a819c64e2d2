package fastpath_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// guardedNodes are two nodes with policies: web and aside on the first, client and other on the second.
type guardedNodes struct {
	nodes  [2]*node
	rules  [2]*ruleset.Ruleset
	models [2]*policy.Model

	web, aside, client, other pod
}

var podNames = [2][2]string{{"web", "aside"}, {"client", "other"}}

func newGuarded(t testing.TB, mode podnet.Mode) *guardedNodes {
	t.Helper()
	g := &guardedNodes{}
	var pods [2][2]pod
	g.nodes[0], g.nodes[1], pods = twoNodes(t, mode, fastpath.Options{})
	g.web, g.aside, g.client, g.other = pods[0][0], pods[0][1], pods[1][0], pods[1][1]
	for i, n := range g.nodes {
		rules, err := ruleset.Open(n.ns)
		testenv.Must(t, err)
		t.Cleanup(rules.Close)
		g.rules[i], g.models[i] = rules, policy.NewModel(n.name)
		for j, list := range pods {
			for k, p := range list {
				g.models[i].SetPod(policy.Pod{Name: service.Name{Namespace: "x", Name: podNames[j][k]}, Node: g.nodes[j].name, Addrs: p.addrs,
					Labels: map[string]string{"app": podNames[j][k]}, Ports: []policy.PodPort{{Name: "http", Protocol: service.TCP, Number: 8080}}})
			}
		}
	}
	return g
}

// set has the kernels of both nodes hold what policies say.
func (g *guardedNodes) set(t testing.TB, list ...*policy.Policy) {
	t.Helper()
	for i, n := range g.nodes {
		m := g.models[i]
		for _, p := range list {
			m.SetPolicy(p)
		}
		f := m.Facts()
		_, err := g.rules[i].SetPolicies(f, []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i+1)), netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", i+1))})
		testenv.Must(t, err)
		_, err = n.path.Policies().Set(f)
		testenv.Must(t, err)
		holds(t, n, f)
		n.plan.Free = map[netip.Addr]bool{}
		for a, is := range f.Addrs {
			if is.Own && is.Free() {
				n.plan.Free[a] = true
			}
		}
		n.set(t)
	}
}

func holds(t testing.TB, n *node, f policy.Facts) {
	t.Helper()
	if d, err := n.path.Policies().Check(f); err != nil || len(d) > 0 {
		t.Errorf("node %s does not hold what facts say: %v, %v", n.name, d, err)
	}
	if is, err := n.path.Policies().Holds(); err != nil || !is {
		t.Errorf("node %s does not hold what was set: %v", n.name, err)
	}
}

func (g *guardedNodes) counted(t testing.TB, do func()) (here, there map[string]uint64) {
	t.Helper()
	here = g.nodes[0].counted(t, func() { there = g.nodes[1].counted(t, do) })
	return here, there
}

func apps(names ...string) policy.Selector {
	return policy.Selector{{Key: "app", Operator: policy.In, Values: names}}
}

// about is a policy that isolates pods of an app in directions, and allows what rules say.
func about(app string, rules map[policy.Direction][]policy.Rule) *policy.Policy {
	p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: "x", Name: app}}, Subject: apps(app)}
	for d, list := range rules {
		p.Isolates[d], p.Rules[d] = true, list
	}
	return p
}

func ingress(rules ...policy.Rule) map[policy.Direction][]policy.Rule {
	return map[policy.Direction][]policy.Rule{policy.Ingress: rules}
}

func from(names ...string) []policy.Peer {
	return []policy.Peer{{Pods: &policy.Pods{Namespace: "x", Pods: apps(names...)}}}
}

func tcpPorts(from, to uint16) []policy.Port {
	return []policy.Port{{Protocol: service.TCP, From: from, To: to}}
}

func silent(from *link.Namespace, network string, to netip.Addr, port uint16) bool {
	var c net.Conn
	err := from.Do(func() (err error) {
		c, err = net.DialTimeout(network, netip.AddrPortFrom(to, port).String(), 300*time.Millisecond)
		return err
	})
	if err == nil {
		c.Close()
	}
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// TestPolicies: what policies allow by their maps is redirected; what they do not is dropped by the rules.
func TestPolicies(t *testing.T) {
	for _, mode := range []podnet.Mode{podnet.Direct, podnet.VXLAN} {
		g := newGuarded(t, mode)
		serve(t, g.web)
		serve(t, g.client)
		block := func(of pod) []policy.Peer {
			return []policy.Peer{{Block: policy.Block{Prefix: netip.PrefixFrom(of.addrs[0], 32)}}, {Block: policy.Block{Prefix: netip.PrefixFrom(of.addrs[1], 128)}}}
		}
		for _, c := range []struct {
			what    string
			rule    policy.Rule
			allowed bool
		}{
			{"peers", policy.Rule{Peers: from("client", "aside"), AnyPort: true}, true},
			{"a port", policy.Rule{Peers: from("client", "aside"), Ports: tcpPorts(8080, 8080)}, true},
			{"a range", policy.Rule{AnyPeer: true, Ports: tcpPorts(8001, 9000)}, true},
			{"a named port", policy.Rule{Peers: from("client", "aside"), Ports: []policy.Port{{Protocol: service.TCP, Name: "http"}}}, true},
			{"blocks", policy.Rule{Peers: slices.Concat(block(g.client), block(g.aside)), Ports: tcpPorts(8080, 8080)}, true},
			{"other peers", policy.Rule{Peers: from("other", "web"), AnyPort: true}, false},
			{"another port", policy.Rule{AnyPeer: true, Ports: tcpPorts(8081, 9000)}, false},
			{"another protocol", policy.Rule{AnyPeer: true, Ports: []policy.Port{{Protocol: service.UDP, From: 8080, To: 8080}}}, false},
			{"other blocks", policy.Rule{Peers: block(g.other), AnyPort: true}, false},
		} {
			// What it sends is isolated, too, so that replies are not allowed by themselves.
			rules := ingress(c.rule)
			rules[policy.Egress] = nil
			g.set(t, about("web", rules))
			for i, to := range g.web.addrs {
				what := fmt.Sprintf("%s, %s to %s", mode, c.what, to)
				here, there := g.counted(t, func() {
					if c.allowed {
						testenv.Must(t, echo(g.client.Namespace, "tcp", to, 8080, 100_000))
						testenv.Must(t, echo(g.aside.Namespace, "tcp", to, 8080, 100_000))
					} else if !silent(g.client.Namespace, "tcp", to, 8080) || !silent(g.aside.Namespace, "tcp", to, 8080) {
						t.Errorf("%s: there is an answer", what)
					}
				})
				has(t, what, there, "redirected to_node")
				if c.allowed {
					has(t, what, here, "redirected from_node", "redirected to_pod", "redirected to_node")
					hasNot(t, what, here, "stack policy", "stack no_flow", "stack pod", "stack tracked", "dropped forbidden")
				} else {
					has(t, what, here, "stack policy")
					hasNot(t, what, here, "redirected from_node", "redirected to_pod")
				}
				if !silent(g.web.Namespace, "tcp", g.client.addrs[i], 8080) {
					t.Errorf("%s: the other direction is open", what)
				}
			}
		}
		// Datagrams take the stack, whose rules judge them.
		g.set(t, about("web", ingress(policy.Rule{Peers: from("client"), Ports: []policy.Port{{Protocol: service.UDP, From: 8080, To: 8080}}})))
		for _, to := range g.web.addrs {
			here, _ := g.counted(t, func() { testenv.Must(t, echo(g.client.Namespace, "udp", to, 8080, 5000)) })
			hasNot(t, "UDP to "+to.String(), here, "redirected from_node", "redirected to_node")
		}
		for _, n := range g.nodes {
			n.noneInvalid(t)
		}
	}
}

// TestForbiddenLater: a connection that is there follows policies in both its directions, as its client began it, unless it is to be kept.
func TestForbiddenLater(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	allow := ingress(policy.Rule{Peers: from("client", "aside"), AnyPort: true})
	g.set(t, about("web", allow))
	for _, to := range g.web.addrs {
		for _, client := range []pod{g.client, g.aside} {
			c, err := dial(client.Namespace, "tcp", to, 8080)
			testenv.Must(t, err)
			defer c.Close()
			answers := func(patience time.Duration) error {
				testenv.Must(t, c.SetDeadline(time.Now().Add(patience)))
				if _, err := c.Write([]byte("x")); err != nil {
					return err
				}
				_, err := c.Read(make([]byte, 1))
				return err
			}
			testenv.Must(t, answers(5*time.Second))
			g.set(t, about("web", ingress(policy.Rule{Peers: from("client", "aside"), Ports: tcpPorts(1, 2)})))
			here, _ := g.counted(t, func() {
				if err := answers(300 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("%s to %s, forbidden: %v", client.host, to, err)
				}
			})
			has(t, "forbidden", here, "dropped forbidden")
			hasNot(t, "forbidden", here, "stack no_flow", "stack policy")
			flows, err := g.nodes[0].path.Policies().Flows()
			testenv.Must(t, err)
			is := func(f fastpath.Flow) bool {
				return f.Source.String() == c.LocalAddr().String() && f.Destination.String() == c.RemoteAddr().String()
			}
			if i := slices.IndexFunc(flows, is); i < 0 || !flows[i].Refused {
				t.Errorf("the connection is not told to be refused: %v", flows)
			}
			// What the client sent is sent again, and answered.
			g.set(t, about("web", allow))
			testenv.Must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
			_, err = c.Read(make([]byte, 1))
			testenv.Must(t, err)

			testenv.Must(t, g.nodes[0].path.Policies().Keep(true))
			g.set(t, about("web", ingress()))
			testenv.Must(t, answers(5*time.Second))
			if !silent(client.Namespace, "tcp", to, 8080) {
				t.Error("what is kept opens the pod for others")
			}
			testenv.Must(t, g.nodes[0].path.Policies().Keep(false))
			g.set(t, about("web", allow))
			testenv.Must(t, answers(20*time.Second))
		}
	}
}

// TestJudgedElsewhere: what the maps cannot answer is the rules', and no connection is in both.
func TestJudgedElsewhere(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	allow := about("web", ingress(policy.Rule{Peers: from("client", "aside"), AnyPort: true}))
	g.set(t, allow)
	here := g.nodes[0]
	talks := func(c net.Conn) {
		t.Helper()
		testenv.Must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
		for range 20 {
			_, err := c.Write([]byte("x"))
			testenv.Must(t, err)
			_, err = c.Read(make([]byte, 1))
			testenv.Must(t, err)
		}
	}
	for _, step := range []struct {
		what string
		do   func()
		has  string
	}{
		{"the maps are off", func() { testenv.Must(t, here.path.Policies().Off()) }, "stack pod"},
		{"a tier has something to say", func() {
			p := &policy.Policy{ID: policy.ID{Kind: "ClusterNetworkPolicy", Name: service.Name{Name: "t"}}, Tier: policy.Admin, Subject: apps("web"), Rules: [2][]policy.Rule{{
				{Peers: []policy.Peer{{Pods: &policy.Pods{Pods: apps("other")}}}, Action: policy.Deny, AnyPort: true}}}}
			g.set(t, allow, p)
			for _, m := range g.models {
				m.DeletePolicy(p.ID)
			}
		}, "stack policy"},
		{"the table of identities is of somebody else", func() {
			m, err := ebpf.LoadPinnedMap(filepath.Join(here.opts.Dir, pin.Identities), nil)
			testenv.Must(t, err)
			defer m.Close()
			for _, a := range g.web.addrs {
				testenv.Must(t, m.Delete(pin.KeyOf(a)))
			}
			if is, err := here.path.Policies().Holds(); err != nil || is {
				t.Errorf("it passes for what was set: %v", err)
			}
		}, "stack policy"},
	} {
		g.set(t, allow)
		step.do()
		for _, to := range g.web.addrs {
			var c net.Conn
			counts := here.counted(t, func() {
				var err error
				c, err = dial(g.client.Namespace, "tcp", to, 8080)
				testenv.Must(t, err)
				talks(c)
			})
			has(t, step.what, counts, step.has)
			hasNot(t, step.what, counts, "redirected from_node", "redirected to_node")
			g.set(t, allow) // the connection stays where it began
			counts = here.counted(t, func() { talks(c) })
			hasNot(t, step.what+", again as it was", counts, "redirected from_node", "redirected to_node", "dropped forbidden")
			c.Close()
			step.do()
		}
	}
	here.noneInvalid(t)
}

// TestBackFromStack: a connection of which the stack has seen packets stays there.
func TestBackFromStack(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	allow := about("web", ingress(policy.Rule{Peers: from("client"), AnyPort: true}))
	g.set(t, allow)
	here := g.nodes[0]
	for _, step := range []struct {
		what         string
		there, again func()
	}{
		{"the maps are off", func() { testenv.Must(t, here.path.Policies().Off()) }, func() { g.set(t, allow) }},
		{"there is no fast path", func() { here.plan.Fast = false; here.set(t) }, func() { here.plan.Fast = true; here.set(t) }},
		{"the pod is shaped", func() { here.plan.Slow = map[netip.Addr]pin.Stack{g.web.addrs[0]: pin.Shaped}; here.set(t) }, func() { here.plan.Slow = nil; here.set(t) }},
	} {
		c, err := dial(g.client.Namespace, "tcp", g.web.addrs[0], 8080)
		testenv.Must(t, err)
		talk := func() {
			for range 10 {
				_, err := c.Write([]byte("x"))
				testenv.Must(t, err)
				_, err = c.Read(make([]byte, 1))
				testenv.Must(t, err)
			}
		}
		has(t, step.what+", before", here.counted(t, talk), "redirected from_node", "redirected to_node")
		step.there()
		hasNot(t, step.what, here.counted(t, talk), "redirected from_node", "redirected to_node")
		step.again()
		hasNot(t, step.what+", after", here.counted(t, talk), "redirected from_node", "redirected to_node")
		c.Close()
	}
	here.noneInvalid(t)
}

// TestJudgedSmallMTU: who sends too much at once is told, also by a pod that may not begin anything.
func TestJudgedSmallMTU(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	serve(t, g.aside)
	rules := ingress(policy.Rule{Peers: from("aside"), AnyPort: true})
	rules[policy.Egress] = nil
	g.set(t, about("web", rules))
	smallMTU(t, g.nodes[0], g.aside, g.web)
	g.nodes[0].noneInvalid(t)
}

// TestFlowsFull: a connection of which nothing is known any more goes on by the rules, as its client's next packet begins it.
func TestFlowsFull(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	rules := ingress(policy.Rule{Peers: from("client"), AnyPort: true})
	rules[policy.Egress] = nil
	g.set(t, about("web", rules))
	here := g.nodes[0]
	m, err := ebpf.LoadPinnedMap(filepath.Join(here.opts.Dir, pin.Flows), nil)
	testenv.Must(t, err)
	defer m.Close()
	x := newConnection(t, g.client, g.web.addrs[0])
	for i := range 2 * m.MaxEntries() {
		key := make([]byte, m.KeySize())
		copy(key, fmt.Sprint(i))
		testenv.Must(t, m.Put(key, make([]byte, m.ValueSize())))
	}
	x.end(t, "full")
	all, err := here.path.Policies().Flows()
	testenv.Must(t, err)
	if len(all) < int(m.MaxEntries())/2 || len(all) > int(m.MaxEntries()) {
		t.Errorf("%d flows of %d", len(all), m.MaxEntries())
	}
	testenv.Must(t, here.path.Policies().Forget(all))
	if all, err = here.path.Policies().Flows(); err != nil || len(all) > 0 {
		t.Errorf("%d flows are left: %v", len(all), err)
	}
	x = newConnection(t, g.client, g.web.addrs[0])
	for range 3 {
		all, err := here.path.Policies().Flows()
		testenv.Must(t, err)
		testenv.Must(t, here.path.Policies().Forget(all))
	}
	testenv.Eventually(t, "the connection takes the stack", func() (bool, string) {
		list, err := here.path.Counts()
		testenv.Must(t, err)
		return slices.ContainsFunc(list, func(c fastpath.Count) bool { return c.Reason == "no_flow" && c.Packets > 0 }), fmt.Sprint(list)
	})
	x.end(t, "forgotten")
	for range 3 { // there is room for others all the same
		testenv.Must(t, echo(g.client.Namespace, "tcp", g.web.addrs[0], 8080, 10_000))
	}
}

// TestPoliciesRestart: a connection does not notice that the loader goes and comes.
func TestPoliciesRestart(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	serve(t, g.web)
	rules := ingress(policy.Rule{Peers: from("client", "aside"), AnyPort: true})
	rules[policy.Egress] = nil
	g.set(t, about("web", rules))
	here := g.nodes[0]
	counts := here.counted(t, func() {
		list := []*connection{newConnection(t, g.client, g.web.addrs[0]), newConnection(t, g.client, g.web.addrs[1]), newConnection(t, g.aside, g.web.addrs[0])}
		here.path.Close()
		here.open(t)
		if c, err := here.path.Policies().Set(g.models[0].Facts()); err != nil || c != (diff.Count{}) {
			t.Errorf("a restart changes %v, %v", c, err)
		}
		here.set(t)
		for i, x := range list {
			x.end(t, fmt.Sprint("connection ", i))
		}
	})
	hasNot(t, "restart", counts, "stack no_flow", "stack policy", "stack tracked", "dropped forbidden")
}

// TestChangeMaps: what changes leave is what all at once would make.
func TestChangeMaps(t *testing.T) {
	n := newNode(t, "a", fastpath.Options{})
	n.open(t)
	maps := n.path.Policies()
	if err := maps.Change(policy.Facts{}); err == nil {
		t.Error("maps are changed that were not set")
	}
	for seed := range uint64(3) {
		w := fastpath.NewTown(rand.New(rand.NewPCG(seed, 2)), true)
		_, err := maps.Set(w.Facts())
		testenv.Must(t, err)
		holds(t, n, w.Facts())
		for range 100 {
			w.Change()
			testenv.Must(t, maps.Change(w.Changes()))
			holds(t, n, w.Facts())
		}
		if c, err := maps.Set(w.Facts()); err != nil || c != (diff.Count{}) {
			t.Errorf("all at once changes %v, %v", c, err)
		}
	}
}

// TestPoliciesWithPackets compares what becomes of connections with what facts say, for random policies.
func TestPoliciesWithPackets(t *testing.T) {
	g := newGuarded(t, podnet.Direct)
	byName := map[string]pod{"web": g.web, "aside": g.aside, "client": g.client, "other": g.other}
	for _, p := range byName {
		serve(t, p)
	}
	r := rand.New(rand.NewPCG(7, 7))
	any := []string{"web", "aside", "client", "other"}
	for range 12 {
		var list []*policy.Policy
		for _, name := range any {
			rules := map[policy.Direction][]policy.Rule{}
			for _, d := range policy.Directions {
				if r.IntN(2) == 0 {
					rules[d] = nil
					for range r.IntN(3) {
						from := uint16(r.IntN(9000))
						x := policy.Rule{Peers: from2(r, byName, any), Ports: tcpPorts(from, from+uint16(r.IntN(9000)))}
						if r.IntN(3) == 0 {
							x.AnyPort, x.Ports = true, nil
						}
						rules[d] = append(rules[d], x)
					}
				}
			}
			list = append(list, about(name, rules))
		}
		g.set(t, list...)
		f := [2]policy.Facts{g.models[0].Facts(), g.models[1].Facts()}
		var all sync.WaitGroup
		for a, x := range byName {
			for b, y := range byName {
				for i := range x.addrs {
					if a == b {
						continue
					}
					p := policy.Packet{From: x.addrs[i], To: y.addrs[i], Protocol: service.TCP, Port: 8080}
					allowed := !slices.ContainsFunc(f[:], func(f policy.Facts) bool {
						return !f.Judge(policy.Egress, p).Allowed || !f.Judge(policy.Ingress, p).Allowed
					})
					all.Go(func() {
						if allowed {
							if err := echo(x.Namespace, "tcp", y.addrs[i], 8080, 2000); err != nil {
								t.Errorf("%s to %s, allowed: %v", a, b, err)
							}
						} else if !silent(x.Namespace, "tcp", y.addrs[i], 8080) {
							t.Errorf("%s to %s, not allowed: there is an answer", a, b)
						}
					})
				}
			}
		}
		all.Wait()
	}
	for _, n := range g.nodes {
		counts := n.counts(t)
		has(t, n.name, counts, "redirected to_pod", "redirected to_node", "redirected from_node", "stack policy")
		n.noneInvalid(t)
	}
}

func from2(r *rand.Rand, pods map[string]pod, names []string) []policy.Peer {
	name := names[r.IntN(len(names))]
	if r.IntN(3) > 0 {
		return from(name, names[r.IntN(len(names))])
	}
	a := pods[name].addrs
	p4, _ := a[0].Prefix(24 + r.IntN(9))
	p6, _ := a[1].Prefix(64 + r.IntN(65))
	return []policy.Peer{{Block: policy.Block{Prefix: p4}}, {Block: policy.Block{Prefix: p6}}}
}
