// Package topology describes a lab: its clusters, their nodes, the addresses they have and the wires
// between them. It is pure: it reads no file, asks no kernel and starts nothing. Parse turns a lab file
// into a Lab, Default makes the lab of `fathom up` without arguments, and both end in the same
// validation, so that what the rest of the program gets is always a lab that can be built.
package topology

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// Lab is a whole lab with every default filled in.
type Lab struct {
	// Name is a DNS label of at most 20 characters; it selects the lab on every command.
	Name string
	// Underlay4 and Underlay6 are what the nodes' own addresses are taken from, a /24 and a /64 a
	// cluster. A zero prefix means that `up` chooses one that nothing on the host uses.
	Underlay4 netip.Prefix // a /16
	Underlay6 netip.Prefix // a /48
	// HostAccess is what of the host itself pods and nodes reach by the uplink.
	HostAccess HostAccess `json:",omitempty"`
	Clusters   []Cluster
	hostPaths  []hostPath // of mounts and volumes, for CheckHostPaths
}

// HostAccess says what of the host itself pods and nodes reach. What the host forwards is no part of it.
type HostAccess string

// The ways.
const (
	HostAccessAll  HostAccess = ""     // every service of the host that listens on an address which they can route to
	HostAccessNone HostAccess = "none" // nothing but answers to what the host has asked
)

// Cluster is one Kubernetes cluster of a lab.
type Cluster struct {
	Name  string // a DNS label of at most 20 characters
	Index int    // position in Lab.Clusters, from 0
	// Nodes holds the control-plane nodes first, then the workers.
	Nodes    []Node
	Families []Family // the cluster's IP families, the primary one first
	// PodCIDRs and ServiceCIDRs hold one prefix for each of Families, in the same order.
	PodCIDRs     []netip.Prefix
	ServiceCIDRs []netip.Prefix
	// NodeMasks is the length of the prefix that each node takes from PodCIDRs, in the same order.
	NodeMasks    []int
	DNSDomain    string // cluster.local
	Network      Network
	Proxy        Proxy
	DNS          DNS
	FeatureGates map[string]bool
	// APIServerArgs, ControllerManagerArgs, SchedulerArgs and KubeletArgs are extra command-line
	// arguments, by flag name without dashes.
	APIServerArgs         map[string]Values
	ControllerManagerArgs map[string]Values
	SchedulerArgs         map[string]Values
	KubeletArgs           map[string]Values
	// APIServerVolumes are files and directories of the host that kube-apiserver sees, on each control-plane node.
	APIServerVolumes []Volume `json:",omitempty"`
	// Manifests are applied while the cluster starts. They are no part of what the cluster is: each `up` has its own.
	Manifests []Manifest `json:"-"`
}

// Family is an IP family.
type Family string

// The IP families.
const (
	IPv4 Family = "ipv4"
	IPv6 Family = "ipv6"
)

// Role says what a node runs.
type Role string

// The roles of a node.
const (
	ControlPlane Role = "control-plane"
	Worker       Role = "worker"
)

// Node is one machine of a cluster.
type Node struct {
	Name  string // CLUSTER-control-plane, CLUSTER-control-plane2, CLUSTER-worker1 …: unique in the lab
	Role  Role
	Index int // position in Cluster.Nodes, from 0
	// PodCIDRs is what this node takes from Cluster.PodCIDRs: block number Index of each.
	PodCIDRs []netip.Prefix
	Labels   map[string]string
	// Taints are all that the node registers with. As in kubeadm's nodeRegistration.taints, a control-plane node whose
	// taints nobody set has ControlPlaneTaint, and a list, be it empty, stands in its place. A cluster of control-plane
	// nodes alone has it on none, since its pods have nowhere else to run.
	Taints []Taint
	Mounts []Mount
	Wire   Wire
}

// ControlPlaneTaint is the key of the taint that keeps ordinary pods off control-plane nodes.
// https://kubernetes.io/docs/reference/labels-annotations-taints/#node-role-kubernetes-io-control-plane-taint
const ControlPlaneTaint = "node-role.kubernetes.io/control-plane"

// Taint is a Kubernetes node taint.
type Taint struct {
	Key, Value, Effect string
}

// Mount makes a directory or file of the host visible in a node.
type Mount struct {
	HostPath string // absolute
	NodePath string // absolute
	ReadOnly bool
}

// Volume makes a directory or file of the host visible in the container of a component.
type Volume struct {
	HostPath  string // absolute
	MountPath string // absolute, in the container
	ReadOnly  bool
}

// Wire is the state of the link between a node and its cluster's switch.
type Wire struct {
	Rate  string  // as tc(8) writes it, such as 10mbit; empty is unlimited
	Delay string  // a duration such as 20ms; empty is none
	Loss  float64 // percent of packets lost
}

// NetworkKind names a way to connect pods.
type NetworkKind string

// The networks that a cluster can have.
const (
	NetworkFathom  NetworkKind = "fathom"
	NetworkBridge  NetworkKind = "bridge"
	NetworkFlannel NetworkKind = "flannel"
	NetworkNone    NetworkKind = "none"
)

// Network is how the pods of a cluster are connected.
type Network struct {
	Kind NetworkKind
	// Mode is how Fathom's network gets packets from node to node: auto (default), direct or vxlan.
	Mode string `json:",omitempty"`
	// VNI and Port are those of Fathom's and flannel's VXLAN; other networks have neither.
	VNI  int // 1 to 16777215, default 4242 and 1
	Port int // UDP, default 4789 and 8472
}

// KernelNeeds are parts of the kernel that only some networks need.
type KernelNeeds struct {
	VXLAN        bool // devices of type vxlan
	BridgeFilter bool // br_netfilter: rules of IP see what bridges carry
}

// Needs returns what the network cannot do without. Fathom's mode auto uses VXLAN where nodes are on several segments, and a
// lab's are on one.
func (n Network) Needs() KernelNeeds {
	switch n.Kind {
	case NetworkFathom:
		return KernelNeeds{VXLAN: n.Mode == string(podnet.VXLAN)}
	case NetworkFlannel:
		return KernelNeeds{VXLAN: true, BridgeFilter: true} // flanneld exits without br_netfilter
	case NetworkBridge, NetworkNone:
	}
	return KernelNeeds{}
}

// ProxyKind names a Service proxy.
type ProxyKind string

// The Service proxies that a cluster can have.
const (
	ProxyFathom    ProxyKind = "fathom" // with Fathom's network alone, whose agent it is a part of
	ProxyKubeProxy ProxyKind = "kube-proxy"
	ProxyNone      ProxyKind = "none"
)

// Proxy is what carries the Services of a cluster.
type Proxy struct {
	Kind ProxyKind
	// Mode is how: kube-proxy's is nftables (default), iptables or ipvs, Fathom's is auto (default: balanced at connect
	// where the kernel can) or nftables.
	Mode string
}

// DNS says who answers pods that ask at the cluster DNS address.
type DNS string

// The ways.
const (
	DNSCluster   DNS = "cluster"    // CoreDNS's pods
	DNSNodeCache DNS = "node-cache" // a cache on the pod's node, with Fathom's network and proxy alone
)

// ControlPlanes returns the control-plane nodes of the cluster.
func (c *Cluster) ControlPlanes() []Node {
	for i, n := range c.Nodes {
		if n.Role != ControlPlane {
			return c.Nodes[:i]
		}
	}
	return c.Nodes
}

// Workers returns the nodes of the cluster that run no control plane.
func (c *Cluster) Workers() []Node { return c.Nodes[len(c.ControlPlanes()):] }
