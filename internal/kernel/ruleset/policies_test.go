package ruleset_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// ownRanges are those of the node of newLab.
var ownRanges = prefixes("10.244.1.0/24", "fd00:10:244:1::/64")

// pods tells a Model of the pods of newLab: a and b of the node "here", and far.
func pods(m *policy.Model) {
	for i, name := range []string{"a", "b", "far"} {
		p := policy.Pod{Name: service.Name{Namespace: "x", Name: name}, Node: "here", Labels: map[string]string{"app": name},
			Ports: []policy.PodPort{{Name: "http", Protocol: service.TCP, Number: 8080}}}
		for _, f := range families {
			p.Addrs = append(p.Addrs, netip.MustParseAddr([]string{f.a, f.b, f.far}[i]))
		}
		if name == "far" {
			p.Namespace, p.Node = "y", "there"
		}
		m.SetPod(p)
	}
}

func named(name string, subject policy.Selector, ways ...policy.Direction) *policy.Policy {
	p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: "x", Name: name}}, Subject: subject}
	for _, d := range ways {
		p.Isolates[d] = true
	}
	return p
}

func rule(p *policy.Policy, d policy.Direction, r policy.Rule) *policy.Policy {
	r.Position = fmt.Sprintf("spec.%s[%d]", d, len(p.Rules[d]))
	for i := range r.Peers {
		r.Peers[i].Position = fmt.Sprintf("%s.%s[%d]", r.Position, map[policy.Direction]string{policy.Ingress: "from", policy.Egress: "to"}[d], i)
	}
	p.Rules[d] = append(p.Rules[d], r)
	return p
}

func app(names ...string) policy.Selector {
	return policy.Selector{{Key: "app", Operator: policy.In, Values: names}}
}

func podsOf(namespace string, s policy.Selector) policy.Peer {
	return policy.Peer{Pods: &policy.Pods{Namespace: namespace, Pods: s}}
}

func blockOf(cidr string, except ...string) policy.Peer {
	return policy.Peer{Block: policy.Block{Prefix: netip.MustParsePrefix(cidr), Except: prefixes(except...)}}
}

func ports(p service.Protocol, from, to uint16) []policy.Port {
	return []policy.Port{{Protocol: p, From: from, To: to}}
}

// everyKind are policies with something for each set of the table.
func everyKind() []*policy.Policy {
	in := named("in", app("a"), policy.Ingress)
	rule(in, policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf("y", nil)}, Ports: []policy.Port{{Protocol: service.TCP, Name: "http"}}})
	rule(in, policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf("x", app("b"))}, AnyPort: true})
	rule(in, policy.Ingress, policy.Rule{AnyPeer: true, Ports: ports(service.UDP, 8000, 9000)})
	rule(in, policy.Ingress, policy.Rule{Peers: []policy.Peer{blockOf("203.0.113.0/24", "203.0.113.10/32"), blockOf("2001:db8:2::/64", "2001:db8:2::10/128")}, Ports: ports(service.TCP, 8080, 8081)})
	out := named("out", nil, policy.Egress)
	rule(out, policy.Egress, policy.Rule{Peers: []policy.Peer{podsOf("x", nil)}, AnyPort: true})
	rule(out, policy.Egress, policy.Rule{Peers: []policy.Peer{blockOf("10.244.0.0/24"), blockOf("fd00:10:244::/64")}, AnyPort: true})
	return []*policy.Policy{in, out, named("deny", app("b"), policy.Ingress)}
}

// audited are the policies that isolate nobody.
func audited(list []*policy.Policy) []*policy.Policy {
	for _, p := range list {
		p.Audit = true
	}
	return list
}

// inTier is a policy of a tier whose subjects are pods by their labels.
func inTier(tier policy.Tier, priority int32, name string, subject policy.Selector) *policy.Policy {
	return &policy.Policy{ID: policy.ID{Kind: "ClusterNetworkPolicy", Name: service.Name{Name: name}}, Tier: tier, Priority: priority, Subject: subject}
}

func nodes(s policy.Selector) policy.Peer { return policy.Peer{Nodes: &s} }

// everyTier are policies with something for each set of what tiers say. Behind them are those of everyKind.
func everyTier() []*policy.Policy {
	a := inTier(policy.Admin, 1, "a", app("a"))
	rule(a, policy.Ingress, policy.Rule{Action: policy.Deny, Peers: []policy.Peer{podsOf("", app("far"))}, Ports: ports(service.UDP, 8080, 8080)})
	rule(a, policy.Ingress, policy.Rule{Action: policy.Pass, Peers: []policy.Peer{podsOf("", app("far"))}, Ports: ports(service.TCP, 8000, 9000), Name: "own"})
	rule(a, policy.Ingress, policy.Rule{Action: policy.Accept, Peers: []policy.Peer{podsOf("", app("far"))}, AnyPort: true})
	b := inTier(policy.Admin, 2, "b", nil)
	rule(b, policy.Egress, policy.Rule{Action: policy.Accept, Peers: []policy.Peer{blockOf("10.244.1.2/32"), blockOf("fd00:10:244:1::2/128")}, AnyPort: true})
	rule(b, policy.Egress, policy.Rule{Action: policy.Deny, Peers: []policy.Peer{podsOf("", app("a", "b"))}, AnyPort: true})
	rule(b, policy.Egress, policy.Rule{Action: policy.Deny, Peers: []policy.Peer{nodes(nil)}, Ports: ports(service.TCP, 8080, 8080), Name: "nodes"})
	rule(b, policy.Egress, policy.Rule{Action: policy.Deny, Peers: []policy.Peer{blockOf("203.0.113.0/24"), blockOf("2001:db8:2::/64")}, AnyPort: true})
	base := inTier(policy.Baseline, 1, "base", app("b"))
	rule(base, policy.Ingress, policy.Rule{Action: policy.Deny, Peers: []policy.Peer{podsOf("", nil)}, Ports: ports(service.TCP, 1, 8080)})
	return []*policy.Policy{a, b, base}
}

func modelOf(list ...*policy.Policy) *policy.Model {
	m := policy.NewModel("here")
	for _, p := range list {
		m.SetPolicy(p)
	}
	pods(m)
	return m
}

func setPolicies(t testing.TB, r *ruleset.Ruleset, f policy.Facts, want diff.Count) {
	t.Helper()
	got, err := r.SetPolicies(f, ownRanges)
	testenv.Must(t, err)
	if got != want {
		t.Errorf("changed %+v, want %+v", got, want)
	}
	if again, err := r.SetPolicies(f, ownRanges); err != nil || again != (diff.Count{}) {
		t.Errorf("the second time changes %+v, %v", again, err)
	}
	if holds, err := r.HoldsPolicies(t.Context()); err != nil || !holds {
		t.Errorf("the kernel does not hold what was set: %v", err)
	}
}

func TestPolicies(t *testing.T) {
	n, r := space(t)
	setPolicies(t, r, modelOf(everyKind()...).Facts(), diff.Count{Added: 1})
	isGolden(t, n, ruleset.PolicyTable, "testdata/policy.nft")
	testenv.Must(t, r.DeletePolicies())
	m := modelOf(slices.Concat(everyKind(), everyTier())...)
	m.SetNode(policy.Node{Name: "here", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}})
	f := m.Facts()
	setPolicies(t, r, f, diff.Count{Added: 1})
	want := isGolden(t, n, ruleset.PolicyTable, "testdata/policy-tiers.nft")

	// What another process set is found as it is.
	var again *ruleset.Ruleset
	testenv.Must(t, n.Do(func() (err error) {
		again, err = ruleset.Open("/proc/thread-self/ns/net")
		return err
	}))
	defer again.Close()
	setPolicies(t, again, f, diff.Count{})

	for _, drift := range []string{
		"add element inet T allow_peers { 1:1 }",
		"flush set inet T allow_ports",
		"flush map inet T ingress4",
		"add element inet T identities4 { 10.9.9.9 : 0:7 }",
		"add element inet T own_pods4 { 10.9.0.0/16 }",
		"insert rule inet T judge_ingress return",
		"flush chain inet T forward",
		"flush map inet T tier_ports",
		"flush map inet T behind_ingress4",
		"insert rule inet T judge_egress_tiers accept",
		"flush chain inet T input",
		"delete table inet T",
	} {
		t.Run(drift, func(t *testing.T) {
			nft(t, n, strings.Fields(strings.ReplaceAll(drift, " T", " "+ruleset.PolicyTable))...)
			if holds, err := r.HoldsPolicies(t.Context()); err != nil || holds {
				t.Errorf("passes for what it should be: %v", err)
			}
			_, err := r.SetPolicies(f, ownRanges)
			testenv.Must(t, err)
			setPolicies(t, r, f, diff.Count{})
			if got := nft(t, n, "list", "table", "inet", ruleset.PolicyTable); got != want {
				t.Errorf("got:\n%s", got)
			}
		})
	}
	testenv.Must(t, r.DeletePolicies())
	testenv.Must(t, r.DeletePolicies())
	if got := nft(t, n, "list", "ruleset"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}

// TestChangePolicies: what changes leave is what all at once would make.
func TestChangePolicies(t *testing.T) {
	n, r := space(t)
	m := modelOf()
	if err := r.ChangePolicies(m.Changes()); err == nil {
		t.Error("policies are changed that were not set")
	}
	_, err := r.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	step := func(what string) {
		t.Helper()
		testenv.Must(t, r.ChangePolicies(m.Changes()))
		got := nft(t, n, "list", "table", "inet", ruleset.PolicyTable)
		if count, err := r.SetPolicies(m.Facts(), ownRanges); err != nil || count != (diff.Count{}) {
			t.Errorf("%s: all at once changes %+v, %v", what, count, err)
		}
		nft(t, n, "delete", "table", "inet", ruleset.PolicyTable)
		_, err := r.SetPolicies(m.Facts(), ownRanges)
		testenv.Must(t, err)
		if want := sortedLines(nft(t, n, "list", "table", "inet", ruleset.PolicyTable)); sortedLines(got) != want {
			t.Errorf("%s: got\n%s\nwant\n%s", what, sortedLines(got), want)
		}
	}
	for _, p := range slices.Concat(everyKind(), everyTier()) {
		m.SetPolicy(p)
		step("policy " + p.Name.Name)
	}
	m.SetNode(policy.Node{Name: "here", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}})
	step("a node comes")
	m.SetPod(policy.Pod{Name: service.Name{Namespace: "x", Name: "c"}, Node: "here", Labels: map[string]string{"app": "a"}, Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.4")}})
	step("a pod comes")
	m.SetPod(policy.Pod{Name: service.Name{Namespace: "x", Name: "c"}, Node: "here", Labels: map[string]string{"app": "b"}, Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.4")}})
	step("a pod has other labels")
	wider := everyKind()[0]
	rule(wider, policy.Ingress, policy.Rule{Peers: []policy.Peer{blockOf("203.0.112.0/23")}, AnyPort: true})
	m.SetPolicy(wider)
	step("a policy has another rule")
	m.DeletePod(service.Name{Namespace: "x", Name: "c"})
	step("a pod goes")
	for _, p := range slices.Concat(everyKind(), everyTier()) {
		m.DeletePolicy(p.ID)
		step("without policy " + p.Name.Name)
	}
}

func sortedLines(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == ',' })
	for i := range lines {
		lines[i] = strings.TrimSpace(strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(lines[i]), "elements = {"), " }"))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// passes compares what becomes of a connection with what the facts say of it, as they are judged by the node of its two ends that is this
// one.
func passes(t *testing.T, from *link.Namespace, network, source, to string, f policy.Facts) {
	t.Helper()
	at := netip.MustParseAddrPort(to)
	p := policy.Packet{From: netip.MustParseAddr(source), To: at.Addr(), Protocol: service.TCP, Port: at.Port()}
	if strings.HasPrefix(network, "udp") {
		p.Protocol = service.UDP
	}
	out, in := f.Judge(policy.Egress, p), f.Judge(policy.Ingress, p)
	if !out.Allowed || !in.Allowed {
		hears(t, from, network, source, to)
		return
	}
	if _, _, err := ask(from, network, source, to, patience); err != nil {
		t.Errorf("%s from %s to %s, allowed by %s and %s: %v", network, source, to, out.By, in.By, err)
	}
}

func TestPoliciesWithPackets(t *testing.T) {
	t.Run("NetworkPolicies", func(t *testing.T) { withPackets(t, modelOf(everyKind()...)) })
	t.Run("tiers", func(t *testing.T) {
		m := modelOf(slices.Concat(everyKind(), everyTier())...)
		m.SetNode(theNode())
		l := withPackets(t, m)
		for _, f := range families { // NetworkPolicies are not about a pod's own node, and tiers are
			serve(t, l.node, netip.AddrPortFrom(netip.MustParseAddr(f.node), 8080))
			hears(t, l.b, "tcp"+f.network, f.b, host(f.node, 8080))
			if _, _, err := ask(l.b, "udp"+f.network, f.b, host(f.node, 8080), patience); err != nil {
				t.Errorf("b does not reach its node by UDP: %v", err)
			}
		}
	})
	t.Run("audited", func(t *testing.T) {
		all := everyKind()
		audited(all[:2]) // the third isolates b
		withPackets(t, modelOf(all...))
	})
	t.Run("audited behind tiers", func(t *testing.T) {
		m := modelOf(slices.Concat(audited(everyKind()), everyTier())...)
		m.SetNode(theNode())
		withPackets(t, m)
	})
	t.Run("tiers alone", func(t *testing.T) {
		m := modelOf(everyTier()...)
		m.SetNode(theNode())
		withPackets(t, m)
	})
}

// theNode is the node of newLab.
func theNode() policy.Node {
	return policy.Node{Name: "here", Addrs: []netip.Addr{netip.MustParseAddr(families[0].node), netip.MustParseAddr(families[1].node)}}
}

// withPackets compares what becomes of packets between everyone with what a Model says.
func withPackets(t *testing.T, m *policy.Model) *lab {
	l := newLab(t)
	_, err := l.rules.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	facts := m.Facts()
	var all sync.WaitGroup // silence takes its time
	defer all.Wait()
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			for _, c := range []struct {
				from   *link.Namespace
				source string
			}{{l.a, f.a}, {l.b, f.b}, {l.far, f.far}, {l.out, f.out}, {l.out, f.out2}} {
				for _, to := range []string{f.a, f.b, f.far} {
					if c.source != to && (c.from != l.out || to != f.far) { // far has no way back to those outside
						all.Go(func() { passes(t, c.from, network, c.source, host(to, 8080), facts) })
					}
				}
			}
			// The node is always heard, and always hears.
			for _, to := range []string{f.a, f.b} {
				if _, _, err := ask(l.node, network, "", host(to, 8080), patience); err != nil {
					t.Errorf("%s from the node to %s: %v", network, to, err)
				}
			}
		}
		for source, from := range map[string]*link.Namespace{f.b: l.b, f.far: l.far} { // pings have no ports
			p := policy.Packet{From: netip.MustParseAddr(source), To: netip.MustParseAddr(f.a), Protocol: 1}
			allowed := facts.Judge(policy.Egress, p).Allowed && facts.Judge(policy.Ingress, p).Allowed
			if out, err := linktest.Try(from, "ping", "-c1", map[bool]string{true: "-W2", false: "-W1"}[allowed], "-I", source, f.a); (err == nil) != allowed {
				t.Errorf("ping from %s to %s: %s; want it allowed: %v", source, f.a, out, allowed)
			}
		}
	}
	return l
}

// TestPoliciesAndServices: what counts is the pod that a Service sends to, and a pod meets itself behind one.
func TestPoliciesAndServices(t *testing.T) {
	l := newLab(t)
	set(t, l.rules, manyKinds())
	onlyFar := rule(named("far", nil, policy.Ingress, policy.Egress), policy.Egress, policy.Rule{Peers: []policy.Peer{podsOf("y", nil)}, AnyPort: true})
	_, err := l.rules.SetPolicies(modelOf(onlyFar).Facts(), ownRanges)
	testenv.Must(t, err)
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			if server, _, err := ask(l.a, network, "", host(fmt.Sprintf(f.vip, 2), 80), patience); err != nil || server != f.a {
				t.Errorf("%s: a meets %s behind its own Service, %v", network, server, err)
			}
			hears(t, l.b, network, "", host(fmt.Sprintf(f.vip, 2), 80))
			hears(t, l.out, network, f.out, host(fmt.Sprintf(f.lb, 1), 80))
			met := map[string]bool{}
			for range 12 { // far, itself, or nobody
				server, _, err := ask(l.b, network, "", host(fmt.Sprintf(f.vip, 1), 80), silence)
				if met[server] = true; err != nil && !isTimeout(err) {
					t.Error(err)
				}
			}
			if met[f.a] || !met[f.far] {
				t.Errorf("%s: b meets %v", network, met)
			}
		}
	}
}

// TestPoliciesAreClosedFirst: a pod of the node that is not known yet neither sends nor hears, whoever else is known, and one that is known
// and not isolated is free.
func TestPoliciesAreClosedFirst(t *testing.T) {
	l := newLab(t)
	m := modelOf()
	m.DeletePod(service.Name{Namespace: "x", Name: "b"})
	_, err := l.rules.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	for _, f := range families {
		for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
			hears(t, l.b, network, f.b, host(f.far, 8080))
			hears(t, l.far, network, f.far, host(f.b, 8080))
			hears(t, l.a, network, f.a, host(f.b, 8080))
			passes(t, l.a, network, f.a, host(f.far, 8080), m.Facts())
			passes(t, l.far, network, f.far, host(f.a, 8080), m.Facts())
		}
	}
	pods(m)
	testenv.Must(t, l.rules.ChangePolicies(m.Changes()))
	for _, f := range families {
		passes(t, l.b, "tcp"+f.network, f.b, host(f.far, 8080), m.Facts())
		passes(t, l.far, "udp"+f.network, f.far, host(f.b, 8080), m.Facts())
	}
}

// TestPoliciesKeepConnections: a connection that is there outlives a policy that would not let it begin.
func TestPoliciesKeepConnections(t *testing.T) {
	l := newLab(t)
	m := modelOf()
	_, err := l.rules.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	var open []net.Conn
	for _, f := range families {
		for _, to := range []string{f.a, f.far} {
			c, err := dial(l.b, "tcp"+f.network, "", host(to, 8080), patience)
			testenv.Must(t, err)
			defer c.Close()
			open = append(open, c)
		}
	}
	m.SetPolicy(named("deny", nil, policy.Ingress, policy.Egress))
	testenv.Must(t, l.rules.ChangePolicies(m.Changes()))
	for _, c := range open {
		if _, _, err := say(c, patience); err != nil {
			t.Errorf("%s to %s: %v", c.LocalAddr(), c.RemoteAddr(), err)
		}
	}
	hears(t, l.b, "tcp4", "", host(families[0].a, 8080))
}

// TestRandomPoliciesWithPackets: the kernel does what the facts say, whatever they are.
func TestRandomPoliciesWithPackets(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	l := newLab(t)
	m := modelOf()
	_, err := l.rules.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	peers := []policy.Peer{podsOf("x", app("a")), podsOf("x", app("b")), podsOf("x", nil), podsOf("y", nil), blockOf("0.0.0.0/0"), blockOf("::/0", "fd00::/8"),
		blockOf("10.244.0.0/16", "10.244.1.2/32"), blockOf("203.0.113.9/32"), blockOf("2001:db8:2::/64", "2001:db8:2::10/128")}
	tierPeers := []policy.Peer{podsOf("", app("a")), podsOf("", app("b", "far")), podsOf("", nil), nodes(nil), blockOf("0.0.0.0/0"), blockOf("::/0"),
		blockOf("10.244.0.0/16"), blockOf("10.244.1.2/32"), blockOf("203.0.113.9/32"), blockOf("2001:db8:2::/64"), blockOf("fd00::/8")}
	portLists := [][]policy.Port{nil, ports(service.TCP, 8080, 8080), ports(service.UDP, 8080, 8080), ports(service.TCP, 1, 8079), ports(service.TCP, 8000, 9000),
		ports(service.UDP, 0, 65535), {{Protocol: service.TCP, Name: "http"}}, {{Protocol: service.SCTP, From: 8080, To: 8080}}}
	for range 20 {
		for _, name := range []string{"k", "l"} {
			p := named(name, app([][]string{{"a"}, {"b"}, {"a", "b"}}[r.IntN(3)]...), policy.Directions[r.IntN(2)])
			p.Audit = r.IntN(3) == 0
			for _, d := range policy.Directions {
				for range r.IntN(3) {
					x := policy.Rule{AnyPeer: r.IntN(4) == 0, Ports: portLists[r.IntN(len(portLists))]}
					x.AnyPort = x.Ports == nil
					if !x.AnyPeer {
						x.Peers = []policy.Peer{peers[r.IntN(len(peers))], peers[r.IntN(len(peers))]}
					}
					rule(p, d, x)
				}
			}
			m.SetPolicy(p)
		}
		for _, name := range []string{"s", "t"} {
			p := inTier([]policy.Tier{policy.Admin, policy.Baseline}[r.IntN(2)], int32(r.IntN(2)), name, app([][]string{{"a"}, {"b"}, {"a", "b"}}[r.IntN(3)]...))
			for _, d := range policy.Directions {
				for range r.IntN(4) {
					x := policy.Rule{Action: policy.Action(r.IntN(3)), Ports: portLists[r.IntN(len(portLists))]}
					x.AnyPort = x.Ports == nil
					x.Peers = []policy.Peer{tierPeers[r.IntN(len(tierPeers))], tierPeers[r.IntN(len(tierPeers))]}
					rule(p, d, x)
				}
			}
			m.SetPolicy(p)
		}
		testenv.Must(t, l.rules.ChangePolicies(m.Changes()))
		facts := m.Facts()
		var all sync.WaitGroup
		for range 12 {
			f := families[r.IntN(2)]
			c := []struct {
				from   *link.Namespace
				source string
			}{{l.a, f.a}, {l.b, f.b}, {l.far, f.far}, {l.out, f.out}, {l.out, f.out2}}[r.IntN(5)]
			if to := []string{f.a, f.b, f.far}[r.IntN(3)]; to != c.source && (c.from != l.out || to != f.far) {
				network := []string{"tcp", "udp"}[r.IntN(2)] + f.network
				all.Go(func() { passes(t, c.from, network, c.source, host(to, 8080), facts) })
			}
		}
		all.Wait()
	}
}
