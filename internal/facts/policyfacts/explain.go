package policyfacts

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Cluster is what policies are about, as the API has it.
type Cluster struct {
	Nodes      []*corev1.Node
	Namespaces []*corev1.Namespace
	Pods       []*corev1.Pod
	Policies   []*networkingv1.NetworkPolicy
	// ClusterPolicies are those of policy.networking.k8s.io.
	ClusterPolicies []*cnp.ClusterNetworkPolicy
}

// Model returns a Model of the cluster, in which the pods of all nodes are own ones.
func (c Cluster) Model() *policy.Model {
	m := policy.NewClusterModel()
	for _, n := range c.Namespaces {
		m.SetNamespace(n.Name, n.Labels)
	}
	for _, p := range c.Policies {
		m.SetPolicy(NetworkPolicy(p))
	}
	for _, p := range c.ClusterPolicies {
		m.SetPolicy(ClusterNetworkPolicy(p))
	}
	for _, n := range c.Nodes {
		m.SetNode(Node(n))
	}
	for _, o := range c.Pods {
		if p, ok := Pod(o); ok {
			m.SetPod(p)
		}
	}
	return m
}

// Explanation says whether the cluster's policies allow a connection, and why.
type Explanation struct {
	From     string          `json:"from"` // Pod, Node, or nothing
	To       string          `json:"to"`
	Service  string          `json:"service,omitempty"` // for which To answers
	FromAddr netip.Addr      `json:"fromAddress"`
	ToAddr   netip.Addr      `json:"toAddress"`
	Port     uint16          `json:"port,omitempty"`
	Protocol string          `json:"protocol,omitempty"` // empty for what has no ports
	Allowed  bool            `json:"allowed"`
	Always   string          `json:"always,omitempty"` // why policies are not asked
	Sides    []ExplainedSide `json:"sides,omitempty"`
}

// ExplainedSide is what the policies of one of the two pods say.
type ExplainedSide struct {
	Direction string   `json:"direction"`
	Pod       string   `json:"pod"`
	Allowed   bool     `json:"allowed"`
	Isolated  bool     `json:"isolated"`
	Policies  []string `json:"policies,omitempty"` // that decide
	// Passed is the rule of a ClusterNetworkPolicy that left it to others, if one did.
	Passed string `json:"passed,omitempty"`
	// By is the rule that allows it, "NetworkPolicy shop/web spec.ingress[0].from[1]", or that denies it, of a ClusterNetworkPolicy. Not are
	// the rules of NetworkPolicies that do not allow it, if none does.
	By  string          `json:"by,omitempty"`
	Not []ExplainedRule `json:"not,omitempty"`
	// Audit are the audited NetworkPolicies that would drop what is allowed. Not says then why no rule of theirs allows it.
	Audit []string `json:"audit,omitempty"`
}

// ExplainedRule is a rule that does not allow a connection, and why.
type ExplainedRule struct {
	Rule string `json:"rule"`
	Why  string `json:"why"`
}

// Explain says whether the cluster's policies allow a connection. An address need not be a pod's.
func (c Cluster) Explain(m *policy.Model, p policy.Packet) Explanation {
	e := Explanation{FromAddr: p.From, ToAddr: p.To, Port: p.Port, Allowed: true}
	if p.Protocol != 0 {
		e.Protocol = p.Protocol.String()
	}
	fromPod, fromNode := c.at(m, p.From, &e.From)
	toPod, toNode := c.at(m, p.To, &e.To)
	if p.From == p.To {
		e.Always = "a pod always reaches itself"
		return e
	}
	f := m.Facts()
	toItsNode := fromNode != "" && fromNode == toNode && (!fromPod || !toPod)
	if toItsNode && (!fromPod || !f.JudgeToNode(p).Isolated) {
		e.Always = "a node and its own pods always reach each other"
		return e
	}
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		pod, is := e.From, fromPod
		if d == policy.Ingress {
			pod, is = e.To, toPod
		}
		if !is {
			continue
		}
		v := f.Judge(d, p)
		if toItsNode {
			v = f.JudgeToNode(p)
		}
		s := ExplainedSide{Direction: d.String(), Pod: pod, Allowed: v.Allowed, Isolated: v.Isolated}
		for _, id := range v.Policies {
			s.Policies = append(s.Policies, id.String())
		}
		if v.Passed.Kind != "" {
			s.Passed = v.Passed.Kind + " " + v.Passed.String()
		}
		if v.By.Kind != "" {
			s.By = v.By.Kind + " " + v.By.String()
		}
		for _, id := range v.Audit {
			s.Audit = append(s.Audit, id.String())
		}
		if !v.Allowed && v.By.Kind != ClusterKind || len(v.Audit) > 0 {
			for _, x := range m.Misses(d, p) {
				s.Not = append(s.Not, ExplainedRule{x.Kind + " " + x.String(), why(x, d)})
			}
		}
		e.Allowed = e.Allowed && v.Allowed
		e.Sides = append(e.Sides, s)
	}
	return e
}

func why(x policy.Miss, d policy.Direction) string {
	peer := map[policy.Direction]string{policy.Ingress: "is not for this client", policy.Egress: "is not for this destination"}[d]
	switch {
	case !x.Peer && !x.Port:
		return peer + ", nor for this port"
	case !x.Peer:
		return peer
	case !x.Port:
		return "is not for this port"
	}
	return "names the port, which means nothing for an ipBlock"
}

// at says what has an address: a pod with a network of its own, a node, or nothing of the cluster; and on which node that is.
func (c Cluster) at(m *policy.Model, a netip.Addr, what *string) (pod bool, node string) {
	if name, found := m.PodAt(a); found {
		*what = "Pod " + name.String()
		i := slices.IndexFunc(c.Pods, func(p *corev1.Pod) bool { return service.Name{Namespace: p.Namespace, Name: p.Name} == name })
		return true, c.Pods[i].Spec.NodeName
	}
	for _, n := range c.Nodes {
		first := slices.ContainsFunc(apinode.PodCIDRs(n), func(s string) bool {
			p, err := inet.ParsePrefix(s)
			return err == nil && p.Contains(a) && p.Addr().Next() == a // of its tunnel
		})
		if first || slices.Contains(apinode.Addrs(n), a) {
			*what = "Node " + n.Name
			return false, n.Name
		}
	}
	return false, ""
}
