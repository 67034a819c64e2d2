package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ClusterNetworkPolicy is a network policy of a whole cluster.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type ClusterNetworkPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   ClusterNetworkPolicySpec   `json:"spec"`
	Status ClusterNetworkPolicyStatus `json:"status,omitempty"`
}

// ClusterNetworkPolicyList is a list of them.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type ClusterNetworkPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []ClusterNetworkPolicy `json:"items"`
}

// ClusterNetworkPolicySpec says what a policy does.
type ClusterNetworkPolicySpec struct {
	// Tier is asked as a whole: Admin before all NetworkPolicies, Baseline after them.
	Tier Tier `json:"tier"`
	// Priority is from 0 to 1000; the lower is asked first in its tier.
	Priority int32   `json:"priority"`
	Subject  Subject `json:"subject"`
	// The rules are asked in their order. A direction without any is left alone.
	Ingress []IngressRule `json:"ingress,omitempty"`
	Egress  []EgressRule  `json:"egress,omitempty"`
}

// Tier is a group of policies that are asked together.
type Tier string

// The tiers.
const (
	AdminTier    Tier = "Admin"
	BaselineTier Tier = "Baseline"
)

// ClusterNetworkPolicyStatus is what implementations say of a policy.
type ClusterNetworkPolicyStatus struct {
	Conditions []metav1.Condition `json:"conditions"`
}

// Subject is what a policy applies to: one of the fields is set.
type Subject struct {
	Namespaces *metav1.LabelSelector `json:"namespaces,omitempty"`
	Pods       *NamespacedPod        `json:"pods,omitempty"`
}

// IngressRule is for connections to the subject.
type IngressRule struct {
	Name      string        `json:"name,omitempty"`
	Action    Action        `json:"action"`
	From      []IngressPeer `json:"from"`
	Protocols []Protocol    `json:"protocols,omitempty"`
}

// EgressRule is for connections from the subject.
type EgressRule struct {
	Name      string       `json:"name,omitempty"`
	Action    Action       `json:"action"`
	To        []EgressPeer `json:"to"`
	Protocols []Protocol   `json:"protocols,omitempty"`
}

// Action is what becomes of what a rule is for.
type Action string

// The actions.
const (
	Accept Action = "Accept"
	Deny   Action = "Deny"
	Pass   Action = "Pass" // the next tier decides
)

// IngressPeer is who connects: one of the fields is set. If none is, it is of a newer version of the API, and the rule fails closed.
type IngressPeer struct {
	Namespaces *metav1.LabelSelector `json:"namespaces,omitempty"`
	Pods       *NamespacedPod        `json:"pods,omitempty"`
}

// EgressPeer is who is connected to: one of the fields is set. If none is, it is of a newer version of the API, and the rule fails closed.
type EgressPeer struct {
	Namespaces  *metav1.LabelSelector `json:"namespaces,omitempty"`
	Pods        *NamespacedPod        `json:"pods,omitempty"`
	Nodes       *metav1.LabelSelector `json:"nodes,omitempty"`       // experimental: addresses of their status
	Networks    []string              `json:"networks,omitempty"`    // in CIDR notation
	DomainNames []string              `json:"domainNames,omitempty"` // experimental, of Accept rules alone
}

// NamespacedPod selects pods of namespaces.
type NamespacedPod struct {
	NamespaceSelector metav1.LabelSelector `json:"namespaceSelector"`
	PodSelector       metav1.LabelSelector `json:"podSelector"`
}

// Protocol is what a rule asks of packets: one of the fields is set.
type Protocol struct {
	TCP                  *PortMatch `json:"tcp,omitempty"`
	UDP                  *PortMatch `json:"udp,omitempty"`
	SCTP                 *PortMatch `json:"sctp,omitempty"`
	DestinationNamedPort string     `json:"destinationNamedPort,omitempty"` // experimental
}

// PortMatch asks for a port of the destination.
type PortMatch struct {
	DestinationPort *Port `json:"destinationPort,omitempty"`
}

// Port is a number or a range.
type Port struct {
	Number int32      `json:"number,omitempty"`
	Range  *PortRange `json:"range,omitempty"`
}

// PortRange has both its ends.
type PortRange struct {
	Start int32 `json:"start"`
	End   int32 `json:"end"`
}
