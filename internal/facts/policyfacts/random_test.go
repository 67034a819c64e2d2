package policyfacts_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// TestRandomClusters changes random clusters at random, and compares after each change: what a Model makes of the changes one by one
// with what it makes of all at once, what it tells of each change with what has changed, and its verdicts about all pairs with those of
// an evaluator that goes by the API's text.
func TestRandomClusters(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := random{rand.New(rand.NewPCG(seed, 0))}
	for range 60 {
		w, m := newWorld(), policy.NewClusterModel()
		told := policy.Facts{Addrs: map[netip.Addr]policy.Address{}, Classes: map[policy.Number]*policy.Class{}}
		var history []string
		for range 60 {
			history = append(history, r.change(w, m))
			fresh := w.model()
			follow(told, m.Changes())
			if got, want := describe(m, m.Facts()), describe(fresh, fresh.Facts()); got != want {
				t.Fatalf("after %s\nthe changes have made:\n%s\nall at once makes:\n%s", strings.Join(history, "\n"), got, want)
			}
			if got, want := describe(m, told), describe(m, m.Facts()); got != want {
				t.Fatalf("after %s\nthe Model has told:\n%s\nand has:\n%s", strings.Join(history, "\n"), got, want)
			}
		}
		for _, p := range r.packets(w) {
			allowed, why := judge(told, p)
			if want := w.allows(p); allowed != want {
				t.Fatalf("after %s\n%v: allowed is %v (%s), want %v", strings.Join(history, "\n"), p, allowed, why, want)
			}
			if covered := covers(told.Allowed(p.From, p.To), p); covered != allowed {
				t.Fatalf("after %s\n%v: allowed is %v, and of all that is allowed it is %v: %v", strings.Join(history, "\n"), p, allowed, covered, told.Allowed(p.From, p.To))
			}
			for _, d := range policy.Directions {
				v := told.Judge(d, p)
				if audits := len(v.Audit) > 0; v.Allowed && audits != w.audits(d, p) {
					t.Fatalf("after %s\n%v, %s: audited is %v, want %v", strings.Join(history, "\n"), p, d, v.Audit, w.audits(d, p))
				}
				if problem := explained(m, d, p); problem != "" {
					t.Fatalf("after %s\n%v, %s: %s", strings.Join(history, "\n"), p, d, problem)
				}
			}
		}
	}
}

// covers says whether a packet is one of what is allowed.
func covers(list []policy.Grant, p policy.Packet) bool {
	if nameOf(p.Protocol) == "" {
		p.Protocol, p.Port = 0, 0
	}
	return slices.ContainsFunc(list, func(g policy.Grant) bool {
		return g.All || g.Protocol == p.Protocol && g.From <= p.Port && p.Port <= g.To
	})
}

// explained compares what is said of each rule with the verdict.
func explained(m *policy.Model, d policy.Direction, p policy.Packet) string {
	v, misses := m.Facts().Judge(d, p), m.Misses(d, p)
	if p.From == p.To || !v.Isolated {
		return ""
	}
	for _, miss := range misses {
		if v.By.Kind == policyfacts.ClusterKind {
			continue
		}
		if v.Allowed && v.By.ID == miss.ID && strings.HasPrefix(v.By.Position, miss.Position) && (!miss.Peer || !miss.Port) {
			return fmt.Sprintf("%s allows it, and %+v is said of it", v.By, miss)
		}
		if !v.Allowed && d == policy.Ingress && miss.Peer && miss.Port { // a destination's ports have names, whoever the peer is
			return fmt.Sprintf("it is denied, and %+v is said of a rule", miss)
		}
	}
	if v.Allowed && v.By.Kind == policyfacts.Kind && !slices.ContainsFunc(misses, func(x policy.Miss) bool { return x.Peer && x.Port }) {
		return fmt.Sprintf("%s allows it, and no rule is said to fit: %+v", v.By, misses)
	}
	return ""
}

func follow(f, changes policy.Facts) {
	for a, is := range changes.Addrs {
		if f.Addrs[a] = is; is == (policy.Address{}) {
			delete(f.Addrs, a)
		}
	}
	for n, c := range changes.Classes {
		if f.Classes[n] = c; c == nil {
			delete(f.Classes, n)
		}
	}
}

// describe writes facts down with what numbers stand for in their place: which ones are taken depends on what was there before.
func describe(m *policy.Model, f policy.Facts) string {
	names := m.Identities()
	names[0] = "anyone"
	class := func(n policy.Number) string {
		c := f.Classes[n]
		if n == 0 || c == nil {
			return fmt.Sprint(n)
		}
		var b strings.Builder
		fmt.Fprintf(&b, "%s by %v:", c.Direction, c.Policies)
		var lines []string
		for _, a := range c.Allows {
			lines = append(lines, fmt.Sprintf(" [%s %v]", names[a.Peer], a.Grant))
		}
		slices.Sort(lines)
		return b.String() + strings.Join(lines, "") + fmt.Sprint(c.Blocks)
	}
	var lines []string
	for a, is := range f.Addrs {
		lines = append(lines, fmt.Sprintf("%s %s %v %v\n  %s\n  %s\n  %s\n  %s\n", a, names[is.Peer], is.Own, is.Audited, class(is.Isolated[0]), class(is.Isolated[1]), class(is.Tiers[0]), class(is.Tiers[1])))
	}
	slices.Sort(lines)
	return strings.Join(lines, "") + fmt.Sprintf("%d identities, %d classes", len(names), len(f.Classes))
}

// random makes small clusters, in which things meet.
type random struct{ *rand.Rand }

func pick[T any](r random, list ...T) T { return list[r.IntN(len(list))] }

func (r random) labels() map[string]string {
	l := map[string]string{}
	for range r.IntN(3) {
		l[pick(r, "a", "b", "c")] = pick(r, "1", "2", "3")
	}
	return l
}

// audit adds the label, of many.
func (r random) audit(l map[string]string, of int) map[string]string {
	if r.IntN(of) == 0 {
		all := maps.Clone(l)
		if all == nil {
			all = map[string]string{}
		}
		all["fathom.network/audit"] = "true"
		return all
	}
	return l
}

func (r random) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	for range r.IntN(3) {
		key := pick(r, "a", "b", "c")
		switch r.IntN(5) {
		case 0:
			s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: key, Operator: pick(r, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)})
		case 1:
			s.MatchExpressions = append(s.MatchExpressions, metav1.LabelSelectorRequirement{Key: key, Operator: pick(r, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn),
				Values: []string{pick(r, "1", "2"), pick(r, "2", "3")}})
		default:
			if s.MatchLabels == nil {
				s.MatchLabels = map[string]string{}
			}
			s.MatchLabels[key] = pick(r, "1", "2", "3")
		}
	}
	return s
}

// The addresses of pods, and of others that blocks and packets are about.
var (
	podIPs = []string{"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "10.0.1.2", "10.0.2.1", "fd00::1", "fd00::2", "fd00::1:1"}
	others = []string{"10.0.0.0", "10.0.0.255", "10.0.3.7", "192.0.2.1", "255.255.255.255", "::", "fd00::ff", "2001:db8::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
	cidrs  = []string{"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/16", "10.0.0.0/24", "10.0.0.1/32", "10.0.1.0/24", "10.0.0.2/31", "192.0.2.0/24", "255.255.255.255/32",
		"::/0", "fd00::/16", "fd00::/112", "fd00::1/128", "2001:db8::/32", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"}
	portNames = []string{"http", "dns", "any"}
)

func (r random) pod(name string) *corev1.Pod {
	namespace, short, _ := strings.Cut(name, "/")
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: short, Labels: r.labels()}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	p.Spec.HostNetwork = r.IntN(12) == 0
	p.Status.Phase = pick(r, corev1.PodPending, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed)
	for range r.IntN(3) {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Ports: []corev1.ContainerPort{{Name: pick(r, portNames...), ContainerPort: int32(80 + r.IntN(4)),
			Protocol: pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP, "")}}})
	}
	return p
}

func (r random) policy(namespace, name string) *networkingv1.NetworkPolicy {
	p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	p.Spec.PodSelector = *r.selector()
	p.Labels = r.audit(nil, 3)
	p.Spec.PolicyTypes = pick(r, nil, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"})
	for range r.IntN(3) {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.peers(), Ports: r.ports()})
	}
	for range r.IntN(3) {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.peers(), Ports: r.ports()})
	}
	return p
}

func (r random) peers() (list []networkingv1.NetworkPolicyPeer) {
	for range r.IntN(3) {
		var p networkingv1.NetworkPolicyPeer
		switch r.IntN(4) {
		case 0:
			p.PodSelector = r.selector()
		case 1:
			p.NamespaceSelector = r.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = r.selector(), r.selector()
		case 3:
			p.IPBlock = &networkingv1.IPBlock{CIDR: pick(r, cidrs...)}
			for range r.IntN(3) {
				p.IPBlock.Except = append(p.IPBlock.Except, pick(r, cidrs...))
			}
		}
		list = append(list, p)
	}
	return list
}

func (r random) ports() (list []networkingv1.NetworkPolicyPort) {
	for range r.IntN(3) {
		var p networkingv1.NetworkPolicyPort
		if r.IntN(3) > 0 {
			proto := pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &proto
		}
		switch r.IntN(4) {
		case 0:
			port, end := intstr.FromInt32(int32(79+r.IntN(4))), int32(82+r.IntN(3))
			p.Port, p.EndPort = &port, &end
		case 1:
			port := intstr.FromString(pick(r, portNames...))
			p.Port = &port
		case 2:
			port := intstr.FromInt32(int32(80 + r.IntN(4)))
			p.Port = &port
		}
		list = append(list, p)
	}
	return list
}

func (r random) clusterPolicy(name string) *cnp.ClusterNetworkPolicy {
	p := &cnp.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.Tier, p.Spec.Priority = pick(r, cnp.AdminTier, cnp.AdminTier, cnp.BaselineTier), int32(r.IntN(3))
	if r.IntN(2) == 0 {
		p.Spec.Subject.Namespaces = r.selector()
	} else {
		p.Spec.Subject.Pods = r.namespacedPod()
	}
	for range r.IntN(4) {
		rule := cnp.IngressRule{Action: r.action(), Protocols: r.protocols(true)}
		for range 1 + r.IntN(2) {
			peer := r.tierPeer(false)
			rule.From = append(rule.From, cnp.IngressPeer{Namespaces: peer.Namespaces, Pods: peer.Pods})
		}
		p.Spec.Ingress = append(p.Spec.Ingress, rule)
	}
	for range r.IntN(4) {
		addresses := r.IntN(2) == 0 // no names of ports with them
		rule := cnp.EgressRule{Action: r.action(), Protocols: r.protocols(!addresses), Name: pick(r, "", "named")}
		for range 1 + r.IntN(2) {
			rule.To = append(rule.To, r.tierPeer(addresses))
		}
		p.Spec.Egress = append(p.Spec.Egress, rule)
	}
	return p
}

func (r random) action() cnp.Action { return pick(r, cnp.Accept, cnp.Deny, cnp.Pass) }

func (r random) namespacedPod() *cnp.NamespacedPod {
	return &cnp.NamespacedPod{NamespaceSelector: *r.selector(), PodSelector: *r.selector()}
}

func (r random) tierPeer(addresses bool) (p cnp.EgressPeer) {
	switch n := r.IntN(5); {
	case addresses && n == 0:
		p.Nodes = r.selector()
	case addresses && n < 4:
		for range 1 + r.IntN(2) {
			p.Networks = append(p.Networks, pick(r, cidrs...))
		}
	case n%2 == 0:
		p.Namespaces = r.selector()
	default:
		p.Pods = r.namespacedPod()
	}
	return p
}

func (r random) protocols(named bool) (list []cnp.Protocol) {
	for range r.IntN(3) {
		match := &cnp.PortMatch{}
		switch r.IntN(4) {
		case 0:
			match.DestinationPort = &cnp.Port{Range: &cnp.PortRange{Start: int32(79 + r.IntN(4)), End: int32(83 + r.IntN(3))}}
		case 1, 2:
			match.DestinationPort = &cnp.Port{Number: int32(80 + r.IntN(4))}
		}
		switch n := r.IntN(5); {
		case named && n < 2:
			list = append(list, cnp.Protocol{DestinationNamedPort: pick(r, portNames...)})
		case n == 2:
			list = append(list, cnp.Protocol{UDP: match})
		case n == 3:
			list = append(list, cnp.Protocol{SCTP: match})
		default:
			list = append(list, cnp.Protocol{TCP: match})
		}
	}
	return list
}

func text(x any) string {
	b, err := json.Marshal(x)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// change changes something of the world, and tells the model of it.
func (r random) change(w *world, m *policy.Model) string {
	namespace := pick(r, "x", "y", "z")
	switch n := r.IntN(27); {
	case n >= 24:
		p := r.clusterPolicy(pick(r, "k", "l", "m"))
		w.clusterwide[p.Name] = p
		m.SetPolicy(policyfacts.ClusterNetworkPolicy(p))
		return fmt.Sprintf("cluster policy %s is %+v", p.Name, text(p.Spec))
	case n == 23:
		name := pick(r, "k", "l", "m")
		delete(w.clusterwide, name)
		m.DeletePolicy(policyfacts.ClusterID(name))
		return "cluster policy " + name + " goes"
	case n == 22 || n == 21:
		name := pick(r, "n1", "n2")
		w.node(name, r.labels(), pick(r, others...), pick(r, others...))
		m.SetNode(policyfacts.Node(w.nodes[name]))
		return fmt.Sprintf("node %s has %v %v", name, w.nodes[name].Labels, w.nodes[name].Status.Addresses)
	case n == 20:
		name := pick(r, "n1", "n2")
		delete(w.nodes, name)
		m.DeleteNode(name)
		return "node " + name + " goes"
	case n < 3:
		l := r.audit(r.labels(), 6)
		w.namespace(namespace, l)
		m.SetNamespace(namespace, l)
		return fmt.Sprintf("namespace %s has %v", namespace, l)
	case n == 3:
		delete(w.namespaces, namespace)
		m.DeleteNamespace(namespace)
		return "namespace " + namespace + " goes"
	case n < 11:
		name := namespace + "/" + pick(r, "p", "q", "r")
		p := r.pod(name)
		used := map[string]bool{}
		for other, o := range w.pods {
			for _, ip := range o.Status.PodIPs {
				used[ip.IP] = used[ip.IP] || other != name
			}
		}
		for range r.IntN(3) {
			if ip := pick(r, podIPs...); !used[ip] {
				used[ip] = true
				p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
			}
		}
		w.pods[name] = p
		setPod(m, p)
		return fmt.Sprintf("pod %s is %v %v %v %v host=%v", name, p.Status.PodIPs, p.Labels, p.Spec.Containers, p.Status.Phase, p.Spec.HostNetwork)
	case n < 13:
		name := namespace + "/" + pick(r, "p", "q", "r")
		delete(w.pods, name)
		m.DeletePod(service.Name{Namespace: namespace, Name: name[2:]})
		return "pod " + name + " goes"
	case n < 18:
		p := r.policy(namespace, pick(r, "k", "l"))
		w.policies[namespace+"/"+p.Name] = p
		m.SetPolicy(policyfacts.NetworkPolicy(p))
		return fmt.Sprintf("policy %s/%s %v is %v", namespace, p.Name, p.Labels, p.Spec.String())
	default:
		name := pick(r, "k", "l")
		delete(w.policies, namespace+"/"+name)
		m.DeletePolicy(policyfacts.ID(service.Name{Namespace: namespace, Name: name}))
		return "policy " + namespace + "/" + name + " goes"
	}
}

// packets are those between all addresses that matter, at all ports that do.
func (r random) packets(w *world) (list []policy.Packet) {
	var addrs []netip.Addr
	for _, ip := range slices.Concat(podIPs, others) {
		addrs = append(addrs, netip.MustParseAddr(ip))
	}
	for _, from := range addrs {
		for _, to := range addrs {
			if from.Is4() != to.Is4() {
				continue
			}
			for port := uint16(78); port < 86; port++ {
				list = append(list, policy.Packet{From: from, To: to, Protocol: pick(r, service.TCP, service.UDP, service.SCTP, 1), Port: port})
			}
		}
	}
	return list
}

// TestNoLeftovers: a Model from which all is taken away has what it had at first.
func TestNoLeftovers(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := random{rand.New(rand.NewPCG(seed, 1))}
	w, m := newWorld(), policy.NewClusterModel()
	for range 300 {
		r.change(w, m)
	}
	for _, p := range w.pods {
		m.DeletePod(service.Name{Namespace: p.Namespace, Name: p.Name})
	}
	for _, p := range w.policies {
		m.DeletePolicy(policyfacts.ID(service.Name{Namespace: p.Namespace, Name: p.Name}))
	}
	for _, n := range slices.Collect(maps.Keys(w.namespaces)) {
		m.DeleteNamespace(n)
	}
	for name := range w.clusterwide {
		m.DeletePolicy(policyfacts.ClusterID(name))
	}
	for name := range w.nodes {
		m.DeleteNode(name)
	}
	if got := m.Size(); got != (policy.Size{}) {
		t.Errorf("an empty cluster has %+v", got)
	}
	if f := m.Facts(); len(f.Addrs)+len(f.Classes) > 0 {
		t.Errorf("an empty cluster has %v", f)
	}
}
