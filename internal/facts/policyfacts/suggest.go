package policyfacts

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Seen is a flow and the node that saw it. What a pod is sent or sends is that which its own node sees: another sees it before or after
// addresses are translated.
type Seen struct {
	answer.SeenFlow
	Node string
}

// Suggestion is a NetworkPolicy for the pods of a workload, and for each of its rules the flows that it is from.
type Suggestion struct {
	Policy *networkingv1.NetworkPolicy
	About  string // the pods that it selects
	Rules  [2][]string
}

// workload are pods of a namespace that have the same labels, but for those by which a controller tells its pods apart.
type workload struct {
	namespace, name string
	labels          map[string]string
	pods            []string
}

// ofOnePod are labels that controllers give each pod, each generation or each run.
var ofOnePod = []string{"pod-template-hash", "controller-revision-hash", "pod-template-generation", "statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
	"controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name", "batch.kubernetes.io/job-completion-index"}

// Suggest returns the narrowest NetworkPolicies that allow the flows that were seen, one for each workload of which one was; of a namespace
// alone if it is not empty. Names are asked for by all: where pods of the cluster answer, they may be.
func (c Cluster) Suggest(seen []Seen, namespace string) (all []Suggestion) {
	s := c.suggester()
	type rule struct {
		peer  networkingv1.NetworkPolicyPeer
		ports map[policy.Port]bool
		from  map[string]bool // flows, in words
	}
	rules := map[*workload]*[2]map[string]*rule{} // by the peer's key
	add := func(w *workload, d policy.Direction, peer netip.Addr, f Seen) {
		if namespace != "" && w.namespace != namespace {
			return
		}
		if rules[w] == nil {
			rules[w] = &[2]map[string]*rule{{}, {}}
		}
		key, is := s.peer(w, peer)
		r := rules[w][d][key]
		if r == nil {
			r = &rule{is, map[policy.Port]bool{}, map[string]bool{}}
			rules[w][d][key] = r
		}
		r.ports[policy.Port{Protocol: service.Protocol(f.Protocol), From: f.Port, To: f.Port}] = true
		r.from[s.text(f)] = true
	}
	for _, f := range seen {
		if f.From == f.To || protocolOf(f.Protocol) == nil || f.Port == 0 {
			continue
		}
		from, to := s.at[f.From], s.at[f.To]
		if from != nil && s.nodes[f.From] == f.Node && s.nodeOf[f.To] != f.Node {
			add(from, policy.Egress, f.To, f)
		}
		if to != nil && s.nodes[f.To] == f.Node && s.nodeOf[f.From] != f.Node {
			add(to, policy.Ingress, f.From, f)
		}
	}
	names := map[string]bool{}
	for _, w := range slices.SortedFunc(maps.Keys(rules), (*workload).compare) {
		name := "suggested-" + w.name
		for i := 2; names[w.namespace+"/"+name]; i++ {
			name = fmt.Sprintf("suggested-%s-%d", w.name, i)
		}
		names[w.namespace+"/"+name] = true
		p := &networkingv1.NetworkPolicy{TypeMeta: metav1.TypeMeta{APIVersion: networkingv1.SchemeGroupVersion.String(), Kind: Kind},
			ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name},
			Spec:       networkingv1.NetworkPolicySpec{PodSelector: s.selector(w), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}}}
		x := Suggestion{Policy: p, About: strings.Join(w.pods, ", ")}
		for _, d := range policy.Directions {
			for _, key := range slices.Sorted(maps.Keys(rules[w][d])) {
				r := rules[w][d][key]
				x.Rules[d] = append(x.Rules[d], strings.Join(slices.Sorted(maps.Keys(r.from)), "\n"))
				appendRule(p, d, r.peer, suggestedPorts(r.ports))
			}
		}
		if dns := s.dns; dns != nil && dns != w {
			_, peer := s.peer(w, s.dnsAddr)
			x.Rules[policy.Egress] = append(x.Rules[policy.Egress], "names, which any pod may ask for")
			appendRule(p, policy.Egress, peer, suggestedPorts(map[policy.Port]bool{{Protocol: service.TCP, From: 53, To: 53}: true, {Protocol: service.UDP, From: 53, To: 53}: true}))
		}
		all = append(all, x)
	}
	return all
}

func appendRule(p *networkingv1.NetworkPolicy, d policy.Direction, peer networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
	if d == policy.Ingress {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{peer}, Ports: ports})
		return
	}
	p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{peer}, Ports: ports})
}

func suggestedPorts(ports map[policy.Port]bool) (list []networkingv1.NetworkPolicyPort) {
	for _, p := range slices.SortedFunc(maps.Keys(ports), func(a, b policy.Port) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.From, b.From))
	}) {
		number := intstr.FromInt32(int32(p.From))
		list = append(list, networkingv1.NetworkPolicyPort{Protocol: protocolOf(uint8(p.Protocol)), Port: &number})
	}
	return list
}

func protocolOf(p uint8) *corev1.Protocol {
	name, found := map[service.Protocol]corev1.Protocol{service.TCP: corev1.ProtocolTCP, service.UDP: corev1.ProtocolUDP, service.SCTP: corev1.ProtocolSCTP}[service.Protocol(p)]
	if !found {
		return nil
	}
	return &name
}

// suggester knows who has which address.
type suggester struct {
	workloads []*workload
	at        map[netip.Addr]*workload
	pods      map[netip.Addr]string // names
	nodes     map[netip.Addr]string // of pods
	nodeOf    map[netip.Addr]string // whose address it is
	dns       *workload             // that answers names
	dnsAddr   netip.Addr
}

func (c Cluster) suggester() *suggester {
	s := &suggester{at: map[netip.Addr]*workload{}, pods: map[netip.Addr]string{}, nodes: map[netip.Addr]string{}, nodeOf: map[netip.Addr]string{}}
	m := c.Model()
	byKey := map[string]*workload{}
	for _, o := range c.Pods {
		p, ok := Pod(o)
		if !ok {
			continue
		}
		labels := maps.Clone(p.Labels)
		for _, k := range ofOnePod {
			delete(labels, k)
		}
		key := p.Namespace + "\n" + metav1.FormatLabelSelector(metav1.SetAsLabelSelector(labels))
		w := byKey[key]
		if w == nil {
			w = &workload{namespace: p.Namespace, name: ownerName(o), labels: labels}
			byKey[key] = w
			s.workloads = append(s.workloads, w)
		}
		w.pods = append(w.pods, p.Name.Name)
		slices.Sort(w.pods)
		for _, a := range p.Addrs {
			if whose, found := m.PodAt(a); found && whose == p.Name {
				s.at[a], s.pods[a], s.nodes[a] = w, p.String(), p.Node
				if s.dns == nil && p.Namespace == metav1.NamespaceSystem && p.Labels["k8s-app"] == "kube-dns" {
					s.dns, s.dnsAddr = w, a
				}
			}
		}
	}
	for _, n := range c.Nodes {
		for _, a := range Node(n).Addrs {
			s.nodeOf[a] = n.Name
		}
	}
	slices.SortFunc(s.workloads, (*workload).compare)
	return s
}

func (w *workload) compare(o *workload) int {
	return cmp.Or(strings.Compare(w.namespace, o.namespace), strings.Compare(w.name, o.name), slices.Compare(w.pods, o.pods))
}

// ownerName is what a pod's workload is called: that of a Deployment is its ReplicaSet's without the hash.
func ownerName(o *corev1.Pod) string {
	if by := metav1.GetControllerOf(o); by != nil {
		return strings.TrimSuffix(by.Name, "-"+o.Labels["pod-template-hash"])
	}
	return o.Name
}

// selector selects the pods of a workload, and of those that there are no others: what others have more of labels must not be there.
func (s *suggester) selector(w *workload) metav1.LabelSelector {
	is := metav1.LabelSelector{MatchLabels: w.labels}
	if len(w.labels) == 0 {
		is.MatchLabels = nil
	}
	without := map[string]bool{}
	for _, o := range s.workloads {
		if o == w || o.namespace != w.namespace || !hasAll(o.labels, w.labels) {
			continue
		}
		more := slices.DeleteFunc(slices.Sorted(maps.Keys(o.labels)), func(k string) bool { _, has := w.labels[k]; return has })
		if len(more) > 0 && !slices.ContainsFunc(more, func(k string) bool { return without[k] }) {
			without[more[0]] = true
		}
	}
	for _, k := range slices.Sorted(maps.Keys(without)) {
		is.MatchExpressions = append(is.MatchExpressions, metav1.LabelSelectorRequirement{Key: k, Operator: metav1.LabelSelectorOpDoesNotExist})
	}
	return is
}

func hasAll(labels, these map[string]string) bool {
	for k, v := range these {
		if has, found := labels[k]; !found || has != v {
			return false
		}
	}
	return true
}

// peer returns the peer of a rule by which pods of a workload meet an address, and what it is ordered by: pods before others.
func (s *suggester) peer(of *workload, a netip.Addr) (key string, is networkingv1.NetworkPolicyPeer) {
	w := s.at[a]
	if w == nil {
		return "2 " + string(a.AsSlice()), networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: netip.PrefixFrom(a, a.BitLen()).String()}}
	}
	pods := s.selector(w)
	is.PodSelector = &pods
	if w.namespace != of.namespace {
		is.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: w.namespace}}
	}
	return fmt.Sprintf("1 %s %s %p", w.namespace, w.name, w), is
}

// text is a flow in words, "shop/web > shop/db port 5432/TCP".
func (s *suggester) text(f Seen) string {
	end := func(a netip.Addr) string {
		if name := cmp.Or(s.pods[a], s.nodeOf[a]); name != "" && s.pods[a] == "" {
			return "node " + name + " (" + a.String() + ")"
		} else if name != "" {
			return name
		}
		return a.String()
	}
	return fmt.Sprintf("%s > %s port %d/%s", end(f.From), end(f.To), f.Port, service.Protocol(f.Protocol))
}
