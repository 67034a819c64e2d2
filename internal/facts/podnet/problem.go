package podnet

import "fmt"

// Reason says in one word what is wrong, as the reason of an event does.
type Reason string

// The reasons.
const (
	InvalidConfig  Reason = "InvalidConfig"
	UnknownSelf    Reason = "UnknownSelf"    // no node of ours: there is no plan
	DuplicateName  Reason = "DuplicateName"  // two nodes of one name: the older one counts
	DuplicateAddr  Reason = "DuplicateAddr"  // two nodes have an address: both are routed to
	InvalidAddr    Reason = "InvalidAddr"    // the address is left out
	NoAddr         Reason = "NoAddr"         // the node, or its family, is not reached
	InvalidPodCIDR Reason = "InvalidPodCIDR" // the range is left out
	NoPodCIDR      Reason = "NoPodCIDR"      // there is nothing to route
	Overlap        Reason = "Overlap"        // the older node keeps the range
	UnderlayClash  Reason = "UnderlayClash"  // pods' range and nodes' network overlap: no route
	Leftover       Reason = "Leftover"       // another network's device has an address of this node's pods: it is ignored
	NotOnSegment   Reason = "NotOnSegment"   // mode direct, and a router between
	MACClash       Reason = "MACClash"       // two nodes' tunnels have one MAC address: the older one is reached
	NoUnderlay     Reason = "NoUnderlay"     // a node without an address that the tunnel could use
	BadMTU         Reason = "BadMTU"
)

// Problem is something about a node, or about the configuration if Node is empty, because of which the plan is
// less than was asked for. The rest of the plan is good.
type Problem struct {
	Node   string
	Reason Reason
	Text   string
}

func (p Problem) String() string {
	if p.Node == "" {
		return p.Text
	}
	return fmt.Sprintf("node %s: %s", p.Node, p.Text)
}
