package kube

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
)

// Reference names an object in events. Its kind follows from its type: objects that were listed or watched do not state it.
func Reference(o Object) corev1.ObjectReference {
	var kind schema.GroupVersionKind
	for _, s := range []*runtime.Scheme{customScheme, scheme.Scheme} {
		if kinds, _, err := s.ObjectKinds(o); err == nil {
			kind = kinds[0]
			break
		}
	}
	version, name := kind.ToAPIVersionAndKind()
	return corev1.ObjectReference{Kind: name, APIVersion: version, Namespace: o.GetNamespace(), Name: o.GetName(), UID: o.GetUID(), ResourceVersion: o.GetResourceVersion()}
}

// NodeReference names a node as kubelet does in its events, so that `kubectl describe node` shows both.
func NodeReference(name string) corev1.ObjectReference {
	return corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: name, UID: types.UID(name)}
}
