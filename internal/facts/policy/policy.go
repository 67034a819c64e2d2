// Package policy decides which connections of pods the cluster's policies allow, and says which rule of which policy does.
//
// A Model is told of policies, namespaces and pods, and compiles them into Facts of one node, which its kernel can hold: every
// address has the number of an identity, which stands for all pods that no policy tells apart, and a pod of the node has a
// class in each direction, which stands for the policies that select it. What a class allows is said of identities, so
// that nothing grows with policies times pods. docs/design/policy.md.
package policy

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// ID names a policy.
type ID struct {
	Kind string // as in the API, "NetworkPolicy"
	service.Name
}

// String returns "NetworkPolicy default/web", or "ClusterNetworkPolicy web" of a policy that is in no namespace.
func (i ID) String() string { return i.Kind + " " + i.path() }

func (i ID) path() string {
	if i.Namespace == "" {
		return i.Name.Name
	}
	return i.Name.String()
}

// Compare orders IDs by kind, then by name.
func (i ID) Compare(o ID) int { return cmp.Or(cmp.Compare(i.Kind, o.Kind), i.Name.Compare(o.Name)) }

// Direction is that of a connection, seen from the pod that a policy selects.
type Direction uint8

// The directions.
const (
	Ingress Direction = iota
	Egress
)

// Directions are both.
var Directions = []Direction{Ingress, Egress}

// String returns the direction as it is called in the API's fields, "ingress".
func (d Direction) String() string { return [...]string{"ingress", "egress"}[d] }

// Tier says when a policy is asked: those of Admin before all others, NetworkPolicies after them, and those of Baseline where no NetworkPolicy
// isolates the pod.
type Tier uint8

// The tiers. The first is that of NetworkPolicies.
const (
	Namespaced Tier = iota
	Admin
	Baseline
)

// String returns the tier as the API calls it, "Admin"; that of NetworkPolicies is called by their kind.
func (t Tier) String() string { return [...]string{"NetworkPolicy", "Admin", "Baseline"}[t] }

// Action is what becomes of a packet that a rule is for.
type Action uint8

// The actions. Rules of NetworkPolicies have the first.
const (
	Accept Action = iota
	Deny
	Pass // the next tier decides
)

// String returns the action as the API calls it, "Accept".
func (a Action) String() string { return [...]string{"Accept", "Deny", "Pass"}[a] }

// Policy is a NetworkPolicy or a ClusterNetworkPolicy as a Model takes it.
type Policy struct {
	ID
	Tier Tier
	// Priority orders the policies of Admin and those of Baseline: the lower is asked first. Where it is the same, the name decides.
	Priority int32
	// Namespaces says whose pods a policy of Admin or Baseline may select. A NetworkPolicy selects pods of its own.
	Namespaces Selector
	// Subject says which pods of these namespaces are selected.
	Subject Selector
	// Isolates says for which directions a NetworkPolicy isolates the selected pods: there they may do what a rule allows, and nothing else.
	// One of Admin or Baseline isolates nobody: it is asked in the directions for which it has rules.
	Isolates [2]bool
	// Audit says that a NetworkPolicy isolates nobody by itself: what it would drop if it did is told (Verdict.Audit). What its rules allow
	// is allowed, as that of any other, where another policy isolates the pod.
	Audit bool
	Rules [2][]Rule // by direction
	// Problems are parts of the policy that nothing can be made of. They allow nothing.
	Problems []string
}

// Rule is for connections with any of its peers at any of its ports.
type Rule struct {
	Action Action
	// Position is where the rule stands in its object, "spec.ingress[0]"; Name is what its author calls it, if anything.
	Position, Name string
	// AnyPeer says that the peer may be anyone, in or outside of the cluster; Peers are then none. A rule of Admin or Baseline names its peers.
	AnyPeer bool
	Peers   []Peer
	// AnyPort says that it may be any port, and any protocol, also one that has no ports; Ports are then none.
	AnyPort bool
	Ports   []Port
}

// Peer is one entry of a rule's from or to.
type Peer struct {
	Position string // "spec.ingress[0].from[1]"
	// Pods, if not nil, are the pods that are meant, and Nodes the nodes, of which a rule of Admin or Baseline may be; else Block is meant.
	Pods  *Pods
	Nodes *Selector
	Block Block
}

// Pods selects pods of namespaces.
type Pods struct {
	// Namespace, if not empty, is the only one. Else Namespaces selects them by labels.
	Namespace  string
	Namespaces Selector
	Pods       Selector
}

// String returns a text that is the same for two that select the same pods for the same reason.
func (p Pods) String() string {
	if p.Namespace != "" {
		return fmt.Sprintf("pods %s of namespace %s", p.Pods, p.Namespace)
	}
	return fmt.Sprintf("pods %s of namespaces %s", p.Pods, p.Namespaces)
}

// Block is a range of addresses but for some. Neither has host bits.
type Block struct {
	Prefix netip.Prefix
	Except []netip.Prefix
}

// Port is a range of ports, or a name that each destination pod has its own number for.
type Port struct {
	Protocol service.Protocol // 0, of a name, is any
	From, To uint16           // 0 to 65535 is all of the protocol
	Name     string
}

// Pod is a pod that policies can select and be about: it has a network of its own, and its containers may run.
type Pod struct {
	service.Name
	Created int64 // in seconds, as the API has it
	Node    string
	Labels  map[string]string
	Addrs   []netip.Addr
	Ports   []PodPort
}

// Node is a node as peers select it.
type Node struct {
	Name   string
	Labels map[string]string
	Addrs  []netip.Addr
}

// PodPort is a port of a pod that has a name.
type PodPort struct {
	Name     string
	Protocol service.Protocol
	Number   uint16
}
