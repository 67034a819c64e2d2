package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// IPPool is a range of addresses beside those of the nodes' podCIDRs, for pods that ask for it; docs/ipam.md.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type IPPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   IPPoolSpec   `json:"spec"`
	Status IPPoolStatus `json:"status,omitempty"`
}

// IPPoolList is what a list is.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type IPPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []IPPool `json:"items"`
}

// IPPoolSpec says which addresses, and who may have them. A pod gets one address of each family that is there.
type IPPoolSpec struct {
	IPv4 *IPPoolRange `json:"ipv4,omitempty"`
	IPv6 *IPPoolRange `json:"ipv6,omitempty"`
	// Disabled gives out no further address. Pods keep theirs, and nodes give blocks back as they become empty.
	Disabled bool `json:"disabled,omitempty"`
	// NodeSelector chooses the nodes that may take blocks; nothing is all of them.
	NodeSelector *metav1.LabelSelector `json:"nodeSelector,omitempty"`
	// NamespaceSelector chooses the namespaces whose pods may ask for the pool; nothing is all of them.
	NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector,omitempty"`
}

// IPPoolRange is the part of a family. It cannot be changed.
type IPPoolRange struct {
	CIDR string `json:"cidr"`
	// BlockSize is the length of the prefixes that nodes take from the range. Unset, it is 26 (IPv4) or 122 (IPv6),
	// or the whole range if that is smaller.
	BlockSize int32 `json:"blockSize,omitempty"`
}

// IPPoolStatus is what is known of the pool.
type IPPoolStatus struct {
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	IPv4       *IPPoolUsage       `json:"ipv4,omitempty"`
	IPv6       *IPPoolUsage       `json:"ipv6,omitempty"`
	// Nodes is how many have blocks.
	Nodes int32 `json:"nodes"`
}

// PoolValid is the condition that says whether the pool is used. If not, its message says which field is wrong.
const PoolValid = "Valid"

// IPPoolUsage says how much of a range nodes have taken. How full their blocks are says `fathom ipam show`.
type IPPoolUsage struct {
	// Blocks is how many are taken. Single addresses that pods ask for by annotation count as one each.
	Blocks int64 `json:"blocks"`
	// Addresses and Taken are how many the range has, and how many of them are in blocks; at most 2^63-1.
	Addresses int64 `json:"addresses"`
	Taken     int64 `json:"taken"`
}

// IPBlock is a part of a pool that a node has taken. Its name follows from its prefix, so that the API server lets
// only one node have it. Nodes' agents make and delete them.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type IPBlock struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec IPBlockSpec `json:"spec"`
}

// IPBlockList is what a list is.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type IPBlockList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []IPBlock `json:"items"`
}

// IPBlockSpec cannot be changed.
type IPBlockSpec struct {
	Pool string `json:"pool"`
	CIDR string `json:"cidr"`
	Node string `json:"node"`
	// Fixed is of a single address that a pod asked for: no other pod gets it.
	Fixed bool `json:"fixed,omitempty"`
}
