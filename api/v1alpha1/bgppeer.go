package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// BGPPeer is a router that nodes tell of what is behind them; docs/bgp.md.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type BGPPeer struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   BGPPeerSpec   `json:"spec"`
	Status BGPPeerStatus `json:"status,omitempty"`
}

// BGPPeerList is what a list is.
//
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
type BGPPeerList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []BGPPeer `json:"items"`
}

// BGPPeerSpec says which router, which nodes, and what they tell it.
type BGPPeerSpec struct {
	PeerAddress string `json:"peerAddress,omitempty"`
	// Interface is the nodes' device on whose link a link-local PeerAddress is. Without a PeerAddress the router is the one that is
	// heard there by its Router Advertisements.
	Interface string `json:"interface,omitempty"`
	PeerPort  int32  `json:"peerPort,omitempty"` // 179
	PeerASN   int64  `json:"peerASN"`
	LocalASN  int64  `json:"localASN"`
	// NodeSelector chooses the nodes; nothing is all of them.
	NodeSelector *metav1.LabelSelector `json:"nodeSelector,omitempty"`
	// PasswordSecret is of TCP's MD5 signatures, RFC 2385.
	PasswordSecret *SecretKey `json:"passwordSecret,omitempty"`
	// HoldTimeSeconds is after what silence a session is taken for dead, KeepaliveTimeSeconds how often something
	// is said.
	HoldTimeSeconds      int32 `json:"holdTimeSeconds,omitempty"`      // 90
	KeepaliveTimeSeconds int32 `json:"keepaliveTimeSeconds,omitempty"` // 30
	// EBGPMultihop is how many hops an external peer may be away.
	EBGPMultihop int32 `json:"ebgpMultihop,omitempty"` // 1
	// TTLSecurity has packets dropped that have come further than EBGPMultihop allows, RFC 5082. The router has to have it, too.
	TTLSecurity bool            `json:"ttlSecurity,omitempty"`
	Advertise   []BGPAdvertised `json:"advertise,omitempty"` // PodCIDRs
	// Advertisements say what the router is told, and how, in the place of Advertise.
	Advertisements []BGPAdvertisement `json:"advertisements,omitempty"`
	// Communities are of all routes.
	Communities     []string            `json:"communities,omitempty"`
	GracefulRestart *BGPGracefulRestart `json:"gracefulRestart,omitempty"`
}

// SecretKey is a key of a Secret in the namespace fathom-system.
type SecretKey struct {
	Name string `json:"name,omitempty"` // fathom-bgp, the one that agents may read
	Key  string `json:"key,omitempty"`  // password
}

// BGPAdvertised is a kind of prefixes.
type BGPAdvertised string

// The kinds.
const (
	AdvertisePodCIDRs BGPAdvertised = "PodCIDRs"
	// AdvertiseServiceAddresses are those that Services have of AddressPools, of those that the node carries.
	AdvertiseServiceAddresses BGPAdvertised = "ServiceAddresses"
)

// BGPAdvertisement is some addresses, and how the router is told of them. An address of several is told once, with the
// communities of all and the first LocalPref that there is.
type BGPAdvertisement struct {
	Addresses []BGPAddresses `json:"addresses"`
	// Pools and PoolSelector choose the AddressPools that load balancers' addresses and external IPs are of: one of these, or
	// with these labels. Without both it is any.
	Pools        []string              `json:"pools,omitempty"`
	PoolSelector *metav1.LabelSelector `json:"poolSelector,omitempty"`
	// ServiceSelector chooses the Services; nothing is all of them.
	ServiceSelector *metav1.LabelSelector `json:"serviceSelector,omitempty"`
	Communities     []string              `json:"communities,omitempty"`
	// LocalPref is the LOCAL_PREF attribute, for a router of the same AS.
	LocalPref *int64 `json:"localPref,omitempty"` // 100
	// AggregationLength and AggregationLengthV6 are how long the prefixes are in which Services' addresses are told.
	AggregationLength   int32 `json:"aggregationLength,omitempty"`   // 32
	AggregationLengthV6 int32 `json:"aggregationLengthV6,omitempty"` // 128
}

// BGPAddresses is a kind of addresses.
type BGPAddresses string

// The kinds. Of Services' addresses a node tells of those that it may be sent packets for.
const (
	BGPPodCIDR        BGPAddresses = "PodCIDR"        // the node's ranges of pods
	BGPLoadBalancerIP BGPAddresses = "LoadBalancerIP" // that Services of type LoadBalancer have of AddressPools
	BGPExternalIP     BGPAddresses = "ExternalIP"     // of Services' spec.externalIPs those that an AddressPool has for them
	BGPClusterIP      BGPAddresses = "ClusterIP"
)

// BGPGracefulRestart is RFC 4724: the router keeps the routes while an agent restarts.
type BGPGracefulRestart struct {
	Enabled            *bool `json:"enabled,omitempty"`            // true
	RestartTimeSeconds int32 `json:"restartTimeSeconds,omitempty"` // 120
}

// BGPPeerStatus has an entry of every node, which the node's agent writes.
type BGPPeerStatus struct {
	Sessions []BGPSession `json:"sessions,omitempty"`
}

// BGPSession is a node's session with the peer.
type BGPSession struct {
	Node string `json:"node"`
	// State is that of RFC 4271, Established where all is well, or Refused where the node does not try, for the
	// reason in Message.
	State   string      `json:"state"`
	Since   metav1.Time `json:"since"`
	Message string      `json:"message,omitempty"`
	// Prefixes is how many are announced.
	Prefixes int32 `json:"prefixes"`
}
