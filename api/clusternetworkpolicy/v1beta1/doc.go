// Package v1beta1 has the ClusterNetworkPolicy of policy.networking.k8s.io as network-policy-api v0.3.0 defines it, field by field:
// https://github.com/kubernetes-sigs/network-policy-api. Its CustomResourceDefinition in deploy/crds is upstream's own.
//
// Rejected: upstream's module, which asks for releases of all of Kubernetes' libraries that are newer than those that everything here is
// compiled with.
// +k8s:deepcopy-gen=package
package v1beta1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

//go:generate go run k8s.io/code-generator/cmd/deepcopy-gen@v0.36.3 --output-file zz_generated.deepcopy.go --go-header-file /dev/null .

// GroupVersion is the API group and version.
var GroupVersion = schema.GroupVersion{Group: "policy.networking.k8s.io", Version: "v1beta1"}

// AddToScheme adds the kinds to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &ClusterNetworkPolicy{}, &ClusterNetworkPolicyList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}
