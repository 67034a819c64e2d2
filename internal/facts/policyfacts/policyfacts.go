// Package policyfacts reads what policies mean out of the API's objects: NetworkPolicies and Pods.
package policyfacts

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Kind is what policies of networking.k8s.io are called.
const Kind = "NetworkPolicy"

// ID returns the ID of the NetworkPolicy of a name.
func ID(name service.Name) policy.ID { return policy.ID{Kind: Kind, Name: name} }

// NetworkPolicy reads a NetworkPolicy. What nothing can be made of allows nothing, and is told; the API server refuses nearly all of
// it.
func NetworkPolicy(o *networkingv1.NetworkPolicy) *policy.Policy {
	r := &reader{Policy: policy.Policy{ID: ID(service.Name{Namespace: o.Namespace, Name: o.Name})}}
	subject, err := selector(&o.Spec.PodSelector)
	if err != nil {
		r.problem("spec.podSelector %v: the policy selects all pods of its namespace", err)
		subject = nil
	}
	r.Subject = subject
	r.Isolates = isolates(o.Spec)
	r.audit(o)
	for i, rule := range o.Spec.Ingress {
		if r.Isolates[policy.Ingress] {
			r.rule(policy.Ingress, fmt.Sprintf("spec.ingress[%d]", i), "from", rule.From, rule.Ports)
		}
	}
	for i, rule := range o.Spec.Egress {
		if r.Isolates[policy.Egress] {
			r.rule(policy.Egress, fmt.Sprintf("spec.egress[%d]", i), "to", rule.To, rule.Ports)
		}
	}
	return &r.Policy
}

// isolates returns the directions of policyTypes. The API server fills them in: Ingress always, Egress if there are rules for it.
func isolates(spec networkingv1.NetworkPolicySpec) [2]bool {
	if len(spec.PolicyTypes) == 0 {
		return [2]bool{true, len(spec.Egress) > 0}
	}
	return [2]bool{
		slices.Contains(spec.PolicyTypes, networkingv1.PolicyTypeIngress),
		slices.Contains(spec.PolicyTypes, networkingv1.PolicyTypeEgress),
	}
}

// audit reads whether the policy is audited. What looks like it and is not is told: the policy is enforced.
func (r *reader) audit(o metav1.Object) {
	r.Audit = policy.AuditLabel(o.GetLabels()) && r.Tier == policy.Namespaced
	value, isLabel := o.GetLabels()[policy.Audit]
	_, isAnnotation := o.GetAnnotations()[policy.Audit]
	switch {
	case isAnnotation && !isLabel:
		r.problem("metadata.annotations has %s, which is a label: the policy is enforced", policy.Audit)
	case isLabel && value != "true" && value != "false":
		r.problem("metadata.labels has %s: %q, which is neither true nor false: the policy is enforced", policy.Audit, value)
	case isLabel && value == "true" && r.Tier != policy.Namespaced:
		r.problem("metadata.labels has %s, which is for NetworkPolicies and Namespaces: the policy is enforced", policy.Audit)
	}
}

// reader is a policy that is being read.
type reader struct{ policy.Policy }

func (r *reader) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

func (r *reader) rule(d policy.Direction, position, field string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
	rule := policy.Rule{Position: position, AnyPeer: len(peers) == 0, AnyPort: len(ports) == 0}
	for i, p := range peers {
		at := fmt.Sprintf("%s.%s[%d]", position, field, i)
		if peer, err := r.peer(p); err != nil {
			r.problem("%s %v: it allows nothing", at, err)
		} else {
			peer.Position = at
			rule.Peers = append(rule.Peers, peer)
		}
	}
	for i, p := range ports {
		if port, err := portOf(p); err != nil {
			r.problem("%s.ports[%d] %v: it allows nothing", position, i, err)
		} else {
			rule.Ports = append(rule.Ports, port)
		}
	}
	r.Rules[d] = append(r.Rules[d], rule)
}

func (r *reader) peer(p networkingv1.NetworkPolicyPeer) (policy.Peer, error) {
	if p.IPBlock != nil {
		if p.PodSelector != nil || p.NamespaceSelector != nil {
			return policy.Peer{}, fmt.Errorf("has a selector beside ipBlock")
		}
		b, err := block(p.IPBlock)
		return policy.Peer{Block: b}, err
	}
	if p.PodSelector == nil && p.NamespaceSelector == nil {
		return policy.Peer{}, fmt.Errorf("has none of podSelector, namespaceSelector and ipBlock")
	}
	pods := &policy.Pods{}
	var err error
	if pods.Pods, err = selector(p.PodSelector); err != nil {
		return policy.Peer{}, fmt.Errorf(".podSelector %w", err)
	}
	if p.NamespaceSelector == nil {
		pods.Namespace = r.Namespace
	} else if pods.Namespaces, err = selector(p.NamespaceSelector); err != nil {
		return policy.Peer{}, fmt.Errorf(".namespaceSelector %w", err)
	}
	return policy.Peer{Pods: pods}, nil
}

// selector reads a label selector. None at all selects everything, as an empty one does: that a peer lacks one is its caller's matter.
func selector(s *metav1.LabelSelector) (policy.Selector, error) {
	var all policy.Selector
	if s == nil {
		return nil, nil
	}
	for k, v := range s.MatchLabels {
		all = append(all, policy.Requirement{Key: k, Operator: policy.In, Values: []string{v}})
	}
	for _, e := range s.MatchExpressions {
		r := policy.Requirement{Key: e.Key, Operator: policy.Operator(e.Operator), Values: e.Values}
		switch r.Operator {
		case policy.In, policy.NotIn:
			if len(e.Values) == 0 {
				return nil, fmt.Errorf("has no values for %s of %q", e.Operator, e.Key)
			}
		case policy.Exists, policy.DoesNotExist:
		default:
			return nil, fmt.Errorf("has an operator that is none of the API's, %q", e.Operator)
		}
		all = append(all, r)
	}
	return all, nil
}

func block(b *networkingv1.IPBlock) (policy.Block, error) {
	p, err := prefix(b.CIDR)
	if err != nil {
		return policy.Block{}, err
	}
	is := policy.Block{Prefix: p}
	for _, e := range b.Except {
		p, err := prefix(e)
		if err != nil {
			return policy.Block{}, err
		}
		is.Except = append(is.Except, p)
	}
	return is, nil
}

// prefix reads a CIDR as the API has always done: zeros before a number mean nothing, and host bits are left out.
func prefix(s string) (netip.Prefix, error) {
	p, err := inet.ParsePrefix(s)
	if err != nil {
		return p, fmt.Errorf("has a CIDR %q that %w", s, err)
	}
	return p, nil
}

func portOf(p networkingv1.NetworkPolicyPort) (policy.Port, error) {
	var is policy.Port
	var err error
	if is.Protocol, err = protocol(p.Protocol); err != nil {
		return is, err
	}
	switch {
	case p.Port == nil && p.EndPort != nil:
		return is, fmt.Errorf("has an endPort without a port")
	case p.Port == nil:
		is.To = 1<<16 - 1
	case p.Port.Type == intstr.String && p.EndPort != nil:
		return is, fmt.Errorf("has an endPort, for which its port has to be a number and not the name %q", p.Port.StrVal)
	case p.Port.Type == intstr.String:
		is.Name = p.Port.StrVal
	default:
		from, to := p.Port.IntVal, p.Port.IntVal
		if p.EndPort != nil {
			to = *p.EndPort
		}
		if from < 1 || to < from || to > 1<<16-1 {
			return is, fmt.Errorf("has ports %d to %d, which are none", from, to)
		}
		is.From, is.To = uint16(from), uint16(to)
	}
	return is, nil
}

func protocol(p *corev1.Protocol) (service.Protocol, error) {
	if p == nil {
		return service.TCP, nil
	}
	switch *p {
	case corev1.ProtocolTCP, "":
		return service.TCP, nil
	case corev1.ProtocolUDP:
		return service.UDP, nil
	case corev1.ProtocolSCTP:
		return service.SCTP, nil
	}
	return 0, fmt.Errorf("has a protocol %q that is none of TCP, UDP and SCTP", *p)
}

// Pod reads a pod. It is not ok if policies have nothing to do with it: it is its node (hostNetwork), or its containers do not run any
// more, so that its address may be another's. One that is being deleted runs until it has ended.
func Pod(o *corev1.Pod) (p policy.Pod, ok bool) {
	if o.Spec.HostNetwork || o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
		return policy.Pod{}, false
	}
	p = policy.Pod{Name: service.Name{Namespace: o.Namespace, Name: o.Name}, Created: o.CreationTimestamp.Unix(),
		Node: o.Spec.NodeName, Labels: o.Labels}
	add := func(ip string) {
		if a, err := inet.ParseAddr(ip); err == nil && !slices.Contains(p.Addrs, a) {
			p.Addrs = append(p.Addrs, a)
		}
	}
	add(o.Status.PodIP)
	for _, ip := range o.Status.PodIPs {
		add(ip.IP)
	}
	for _, c := range o.Spec.Containers {
		p.Ports = appendPorts(p.Ports, c.Ports)
	}
	for _, c := range o.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways { // a sidecar
			p.Ports = appendPorts(p.Ports, c.Ports)
		}
	}
	return p, true
}

func appendPorts(to []policy.PodPort, ports []corev1.ContainerPort) []policy.PodPort {
	for _, p := range ports {
		if proto, err := protocol(&p.Protocol); err == nil && p.Name != "" && p.ContainerPort > 0 && p.ContainerPort < 1<<16 {
			to = append(to, policy.PodPort{Name: p.Name, Protocol: proto, Number: uint16(p.ContainerPort)})
		}
	}
	return to
}
