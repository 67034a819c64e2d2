// Package v1alpha1 holds Fathom's own kinds, of the API group fathom.network. There is one only where Kubernetes
// and its working groups have none. The CRDs are in deploy/crds.
//
// +k8s:deepcopy-gen=package
// +groupName=fathom.network
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

//go:generate go run k8s.io/code-generator/cmd/deepcopy-gen@v0.36.3 --output-file zz_generated.deepcopy.go --go-header-file /dev/null .

// GroupVersion is that of the package.
var GroupVersion = schema.GroupVersion{Group: "fathom.network", Version: "v1alpha1"}

// AddToScheme makes the kinds known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &BGPPeer{}, &BGPPeerList{}, &IPPool{}, &IPPoolList{}, &IPBlock{}, &IPBlockList{}, &AddressPool{}, &AddressPoolList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
