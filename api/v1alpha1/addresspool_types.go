package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// AddressPool is a list of addresses for Services of type LoadBalancer; docs/load-balancer.md.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   AddressPoolSpec   `json:"spec"`
	Status AddressPoolStatus `json:"status,omitempty"`
}

// AddressPoolList is what a list is.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type AddressPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AddressPool `json:"items"`
}

// AddressPoolSpec says which addresses, and which Services may have them.
type AddressPoolSpec struct {
	// Addresses are CIDRs (192.0.2.16/28, fd00:80::/120) and ranges (192.0.2.16-192.0.2.31) of both families.
	Addresses []string `json:"addresses"`
	// AutoAssign gives the addresses to Services that ask for none. Unset is true. If false, a Service has to name the
	// pool or the address.
	AutoAssign *bool `json:"autoAssign,omitempty"`
	// NamespaceSelector chooses the namespaces whose Services may have an address; nothing is all of them.
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
	// ServiceSelector chooses the Services that may have an address, by their labels; nothing is all of them.
	ServiceSelector *metav1.LabelSelector `json:"serviceSelector,omitempty"`
}

// AddressPoolStatus is what is known of the pool. PoolValid is its condition, too.
type AddressPoolStatus struct {
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	IPv4       *AddressPoolUsage  `json:"ipv4,omitempty"`
	IPv6       *AddressPoolUsage  `json:"ipv6,omitempty"`
	// Services is how many have an address of the pool.
	Services int32 `json:"services"`
}

// AddressPoolUsage says how many addresses of a family there are, and how many Services have.
type AddressPoolUsage struct {
	Addresses int64 `json:"addresses"` // at most 2^63-1
	Assigned  int64 `json:"assigned"`
}
