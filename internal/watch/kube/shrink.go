package kube

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// Each of these functions keeps the fields of an object that its readers use. They are idempotent.

// shrinkNode drops what makes a Node large: it has 10 KiB and more, most of it the list of images, and every agent holds all
// nodes.
func shrinkNode(o *corev1.Node) *corev1.Node {
	small := &corev1.Node{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
	small.Labels = o.Labels
	small.Spec.PodCIDR, small.Spec.PodCIDRs = o.Spec.PodCIDR, o.Spec.PodCIDRs
	small.Status.Addresses = o.Status.Addresses
	for _, t := range o.Spec.Taints {
		if t.Key == apinode.TaintToBeDeleted {
			small.Spec.Taints = append(small.Spec.Taints, corev1.Taint{Key: t.Key, Effect: t.Effect})
		}
	}
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable || c.Type == corev1.NodeReady { // the one is ours to set; times change every few minutes
			small.Status.Conditions = append(small.Status.Conditions, corev1.NodeCondition{Type: c.Type, Status: c.Status})
		}
	}
	return small
}

func shrinkPod(o *corev1.Pod) *corev1.Pod {
	small := &corev1.Pod{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
	small.Spec.NodeName, small.Spec.HostNetwork = o.Spec.NodeName, o.Spec.HostNetwork
	if hash, found := o.Annotations[corev1.MirrorPodAnnotationKey]; found {
		if small.Annotations == nil {
			small.Annotations = map[string]string{}
		}
		small.Annotations[corev1.MirrorPodAnnotationKey] = hash
	}
	small.Status.Phase, small.Status.PodIP, small.Status.PodIPs = o.Status.Phase, o.Status.PodIP, o.Status.PodIPs
	return small
}

func shrinkNamespace(o *corev1.Namespace) *corev1.Namespace {
	small := &corev1.Namespace{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
	small.Labels = o.Labels
	return small
}

func shrinkPool(o *v1alpha1.IPPool) *v1alpha1.IPPool {
	small := *o
	small.ManagedFields, small.Annotations = nil, nil
	return &small
}

func shrinkAddressPool(o *v1alpha1.AddressPool) *v1alpha1.AddressPool {
	small := *o
	small.ManagedFields, small.Annotations = nil, nil
	return &small
}

func shrinkBlock(o *v1alpha1.IPBlock) *v1alpha1.IPBlock {
	small := &v1alpha1.IPBlock{ObjectMeta: shrinkMeta(&o.ObjectMeta), Spec: o.Spec}
	small.OwnerReferences = o.OwnerReferences
	return small
}

func shrinkServiceCIDR(o *networkingv1.ServiceCIDR) *networkingv1.ServiceCIDR {
	small := &networkingv1.ServiceCIDR{ObjectMeta: shrinkMeta(&o.ObjectMeta)}
	small.Spec.CIDRs = o.Spec.CIDRs
	return small
}

func shrinkConfigMap(o *corev1.ConfigMap) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: shrinkMeta(&o.ObjectMeta), Data: o.Data}
}

func shrinkMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	small := metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, UID: m.UID, ResourceVersion: m.ResourceVersion,
		CreationTimestamp: m.CreationTimestamp, DeletionTimestamp: m.DeletionTimestamp}
	for k, a := range m.Annotations {
		if strings.HasPrefix(k, netconf.AnnotationPrefix) {
			if small.Annotations == nil {
				small.Annotations = map[string]string{}
			}
			small.Annotations[k] = a
		}
	}
	return small
}

// shrinkService keeps the addresses that a Service has and asks for, and the managed fields of owner.
func shrinkService(s *corev1.Service, owner string) *corev1.Service {
	small := &corev1.Service{ObjectMeta: shrinkMeta(&s.ObjectMeta)}
	small.Labels, small.Finalizers, small.Spec, small.Status.LoadBalancer = s.Labels, s.Finalizers, s.Spec, s.Status.LoadBalancer
	small.Spec.Selector = nil
	if ranges, found := s.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey]; found {
		if small.Annotations == nil {
			small.Annotations = map[string]string{}
		}
		small.Annotations[corev1.AnnotationLoadBalancerSourceRangesKey] = ranges
	}
	for _, m := range s.ManagedFields {
		if m.Manager == owner {
			small.ManagedFields = append(small.ManagedFields, metav1.ManagedFieldsEntry{Manager: m.Manager, Subresource: m.Subresource, Operation: m.Operation})
		}
	}
	return small
}

// shrinkPeer keeps of the status the session of one node, and the names of the other nodes.
func shrinkPeer(p *v1alpha1.BGPPeer, node string) *v1alpha1.BGPPeer {
	small := &v1alpha1.BGPPeer{ObjectMeta: shrinkMeta(&p.ObjectMeta), Spec: p.Spec}
	small.Generation = p.Generation
	for _, s := range p.Status.Sessions {
		if s.Node != node {
			s = v1alpha1.BGPSession{Node: s.Node}
		}
		small.Status.Sessions = append(small.Status.Sessions, s)
	}
	return small
}
