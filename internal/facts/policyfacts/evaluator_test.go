package policyfacts_test

import (
	"net"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// allows says whether the API lets a packet through, pod by pod and policy by policy, as the comments of NetworkPolicySpec and
// of ClusterNetworkPolicySpec have it.
// It shares nothing with what it is compared with: selectors are apimachinery's, and ranges are of package net.
func (w *world) allows(p policy.Packet) bool {
	if p.From == p.To {
		return true
	}
	from, to := w.podAt(p.From), w.podAt(p.To)
	return w.oneWay(from, networkingv1.PolicyTypeEgress, to, p.To, to, p) && w.oneWay(to, networkingv1.PolicyTypeIngress, from, p.From, to, p)
}

// audits says whether a packet that is allowed in a direction would be dropped, if the NetworkPolicies that are audited were not: the
// verdict of the world in which none is is asked, as long as nothing but NetworkPolicies makes the difference.
func (w *world) audits(d policy.Direction, p policy.Packet) bool {
	if p.From == p.To {
		return false
	}
	from, to := w.podAt(p.From), w.podAt(p.To)
	enforced := newWorld()
	enforced.pods, enforced.nodes, enforced.clusterwide = w.pods, w.nodes, w.clusterwide
	for name, n := range w.namespaces {
		n = n.DeepCopy()
		delete(n.Labels, "fathom.network/audit")
		enforced.namespaces[name] = n
	}
	for name, np := range w.policies {
		np = np.DeepCopy()
		np.Labels = nil
		enforced.policies[name] = np
	}
	if d == policy.Egress {
		return w.oneWay(from, networkingv1.PolicyTypeEgress, to, p.To, to, p) && !enforced.oneWay(from, networkingv1.PolicyTypeEgress, to, p.To, to, p)
	}
	return w.oneWay(to, networkingv1.PolicyTypeIngress, from, p.From, to, p) && !enforced.oneWay(to, networkingv1.PolicyTypeIngress, from, p.From, to, p)
}

// isAudited says whether a policy isolates nobody.
func (w *world) isAudited(np *networkingv1.NetworkPolicy) bool {
	n := w.namespaces[np.Namespace]
	return np.Labels["fathom.network/audit"] == "true" || n != nil && n.Labels["fathom.network/audit"] == "true"
}

// podAt returns the pod of an address, if it has a network of its own and runs.
func (w *world) podAt(a netip.Addr) *corev1.Pod {
	for _, p := range w.pods {
		over := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
		if over || p.Spec.HostNetwork {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			if ip.IP == a.String() {
				return p
			}
		}
	}
	return nil
}

func (w *world) oneWay(subject *corev1.Pod, way networkingv1.PolicyType, peer *corev1.Pod, peerAddr netip.Addr, destination *corev1.Pod, p policy.Packet) bool {
	if subject == nil {
		return true
	}
	switch w.tier(cnp.AdminTier, subject, way, peer, peerAddr, destination, p) {
	case cnp.Accept:
		return true
	case cnp.Deny:
		return false
	}
	isolated, allowed := false, false
	for _, np := range w.policies {
		if np.Namespace != subject.Namespace || !selects(&np.Spec.PodSelector, subject.Labels) || !slices.Contains(typesOf(np), way) {
			continue
		}
		isolated = isolated || !w.isAudited(np)
		if way == networkingv1.PolicyTypeIngress {
			for _, r := range np.Spec.Ingress {
				if w.anyPeer(np.Namespace, r.From, peer, peerAddr) && anyPort(r.Ports, destination, p) {
					allowed = true
				}
			}
			continue
		}
		for _, r := range np.Spec.Egress {
			if len(r.To) == 0 {
				if anyPort(r.Ports, destination, p) {
					allowed = true
				}
				continue
			}
			for _, to := range r.To {
				named := destination
				if to.IPBlock != nil {
					named = nil // a name means nothing for a range of addresses
				}
				if w.isPeer(np.Namespace, to, peer, peerAddr) && anyPort(r.Ports, named, p) {
					allowed = true
				}
			}
		}
	}
	if isolated {
		return allowed
	}
	return w.tier(cnp.BaselineTier, subject, way, peer, peerAddr, destination, p) != cnp.Deny
}

// tier returns what the first rule that is for a packet says, in a tier's order; "" if there is none.
func (w *world) tier(tier cnp.Tier, subject *corev1.Pod, way networkingv1.PolicyType, peer *corev1.Pod, peerAddr netip.Addr, destination *corev1.Pod, p policy.Packet) cnp.Action {
	var ordered []*cnp.ClusterNetworkPolicy
	for _, c := range w.clusterwide {
		if c.Spec.Tier == tier {
			ordered = append(ordered, c)
		}
	}
	slices.SortFunc(ordered, func(a, b *cnp.ClusterNetworkPolicy) int {
		if a.Spec.Priority != b.Spec.Priority {
			return int(a.Spec.Priority - b.Spec.Priority)
		}
		return strings.Compare(a.Name, b.Name)
	})
	for _, c := range ordered {
		s := c.Spec.Subject
		if !w.isOneOf(s.Namespaces, s.Pods, subject) {
			continue
		}
		if way == networkingv1.PolicyTypeIngress {
			for _, r := range c.Spec.Ingress {
				for _, from := range r.From {
					if w.isOneOf(from.Namespaces, from.Pods, peer) && anyProtocol(r.Protocols, destination, p) {
						return r.Action
					}
				}
			}
			continue
		}
		for _, r := range c.Spec.Egress {
			for _, to := range r.To {
				is := w.isOneOf(to.Namespaces, to.Pods, peer) || to.Nodes != nil && peer == nil && w.isNode(to.Nodes, peerAddr) ||
					slices.ContainsFunc(to.Networks, func(n string) bool { return within(n, peerAddr) })
				if is && anyProtocol(r.Protocols, destination, p) {
					return r.Action
				}
			}
		}
	}
	return ""
}

func (w *world) isOneOf(namespaces *metav1.LabelSelector, pods *cnp.NamespacedPod, pod *corev1.Pod) bool {
	if pod == nil {
		return false
	}
	var of map[string]string
	if n := w.namespaces[pod.Namespace]; n != nil {
		of = n.Labels
	}
	return namespaces != nil && selects(namespaces, of) || pods != nil && selects(&pods.NamespaceSelector, of) && selects(&pods.PodSelector, pod.Labels)
}

func (w *world) isNode(s *metav1.LabelSelector, a netip.Addr) bool {
	for _, n := range w.nodes {
		for _, is := range n.Status.Addresses {
			if is.Address == a.String() && selects(s, n.Labels) {
				return true
			}
		}
	}
	return false
}

func anyProtocol(list []cnp.Protocol, destination *corev1.Pod, p policy.Packet) bool {
	if len(list) == 0 {
		return true
	}
	for _, q := range list {
		match := map[service.Protocol]*cnp.PortMatch{service.TCP: q.TCP, service.UDP: q.UDP, service.SCTP: q.SCTP}[p.Protocol]
		switch {
		case q.DestinationNamedPort != "":
			if destination == nil {
				continue
			}
			for _, c := range destination.Spec.Containers {
				for _, port := range c.Ports {
					of := port.Protocol
					if of == "" {
						of = corev1.ProtocolTCP
					}
					if port.Name == q.DestinationNamedPort && port.ContainerPort == int32(p.Port) && of == nameOf(p.Protocol) {
						return true
					}
				}
			}
		case match == nil:
		case match.DestinationPort == nil:
			return true
		case match.DestinationPort.Range != nil:
			if match.DestinationPort.Range.Start <= int32(p.Port) && int32(p.Port) <= match.DestinationPort.Range.End {
				return true
			}
		case match.DestinationPort.Number == int32(p.Port):
			return true
		}
	}
	return false
}

func typesOf(np *networkingv1.NetworkPolicy) []networkingv1.PolicyType {
	if len(np.Spec.PolicyTypes) > 0 {
		return np.Spec.PolicyTypes
	}
	if len(np.Spec.Egress) > 0 {
		return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	}
	return []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
}

func (w *world) anyPeer(namespace string, peers []networkingv1.NetworkPolicyPeer, pod *corev1.Pod, addr netip.Addr) bool {
	return len(peers) == 0 || slices.ContainsFunc(peers, func(p networkingv1.NetworkPolicyPeer) bool { return w.isPeer(namespace, p, pod, addr) })
}

func (w *world) isPeer(namespace string, p networkingv1.NetworkPolicyPeer, pod *corev1.Pod, addr netip.Addr) bool {
	if p.IPBlock != nil {
		return within(p.IPBlock.CIDR, addr) && !slices.ContainsFunc(p.IPBlock.Except, func(e string) bool { return within(e, addr) })
	}
	if pod == nil {
		return false
	}
	if p.NamespaceSelector == nil {
		if pod.Namespace != namespace {
			return false
		}
	} else {
		var of map[string]string
		if n := w.namespaces[pod.Namespace]; n != nil {
			of = n.Labels
		}
		if !selects(p.NamespaceSelector, of) {
			return false
		}
	}
	return p.PodSelector == nil || selects(p.PodSelector, pod.Labels)
}

func selects(s *metav1.LabelSelector, of map[string]string) bool {
	is, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && is.Matches(labels.Set(of))
}

func within(cidr string, a netip.Addr) bool {
	_, n, err := net.ParseCIDR(cidr)
	return err == nil && n.Contains(a.AsSlice()) && (n.IP.To4() != nil) == a.Is4()
}

func anyPort(ports []networkingv1.NetworkPolicyPort, destination *corev1.Pod, p policy.Packet) bool {
	if len(ports) == 0 {
		return true
	}
	for _, port := range ports {
		protocol := corev1.ProtocolTCP
		if port.Protocol != nil {
			protocol = *port.Protocol
		}
		if protocol != nameOf(p.Protocol) {
			continue
		}
		switch {
		case port.Port == nil:
			return true
		case port.Port.Type == intstr.String:
			if destination == nil {
				continue
			}
			for _, c := range destination.Spec.Containers {
				for _, q := range c.Ports {
					if q.Name == port.Port.StrVal && q.ContainerPort == int32(p.Port) && (q.Protocol == protocol || q.Protocol == "" && protocol == corev1.ProtocolTCP) {
						return true
					}
				}
			}
		case port.EndPort != nil:
			if port.Port.IntVal <= int32(p.Port) && int32(p.Port) <= *port.EndPort {
				return true
			}
		case port.Port.IntVal == int32(p.Port):
			return true
		}
	}
	return false
}

func nameOf(p service.Protocol) corev1.Protocol {
	return map[service.Protocol]corev1.Protocol{6: corev1.ProtocolTCP, 17: corev1.ProtocolUDP, 132: corev1.ProtocolSCTP}[p]
}
