package kube

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// NodeReference names a node as kubelet does in its events, so that `kubectl describe node` shows both.
func NodeReference(name string) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: name, UID: types.UID(name)}
}

// ServiceReference names a Service.
func ServiceReference(name service.Name) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Service", APIVersion: "v1", Namespace: name.Namespace, Name: name.Name}
}

// PoolReference names a pool in events.
func PoolReference(p *v1alpha1.IPPool) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "IPPool", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion}
}

// BlockReference names a block in events.
func BlockReference(name string, uid types.UID) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "IPBlock", APIVersion: v1alpha1.GroupVersion.String(), Name: name, UID: uid}
}

// AddressPoolReference names a pool in events.
func AddressPoolReference(p *v1alpha1.AddressPool) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "AddressPool", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID, ResourceVersion: p.ResourceVersion}
}

// BGPPeerReference names a BGPPeer in events.
func BGPPeerReference(p *v1alpha1.BGPPeer) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "BGPPeer", APIVersion: v1alpha1.GroupVersion.String(), Name: p.Name, UID: p.UID}
}
