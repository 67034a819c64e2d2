package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// Balancers is what an agent says of Services' addresses that the network outside is led to: what it does, and what it takes
// others to do. It follows from what agents hear of each other: two that do not hear each other differ.
type Balancers struct {
	// Waiting says what has to be known before anything is decided; what was decided before stays.
	Waiting string `json:"waiting,omitempty"`
	// Problem is why addresses that it should answer for are not answered for.
	Problem   string        `json:"problem,omitempty"`
	Addresses []vip.Verdict `json:"addresses"`
	// Segments, Alive and Away are what Addresses follow from besides the API's objects: the networks that the node is on, the
	// nodes that it takes to live, and those of them whose agents are away.
	Segments []podnet.Segment `json:"segments,omitempty"`
	Alive    []string         `json:"alive,omitempty"`
	Away     []string         `json:"away,omitempty"`
	Routers  []Router         `json:"routers,omitempty"`
	// Keys are the names (keyset.ID) of the keys by which the agent and others know each other: first the one that it encrypts
	// with. An agent that is no member has none.
	Keys []string `json:"keys,omitempty"`
}

// Router is one that is told of Services' addresses by a node.
type Router struct {
	Peer    string `json:"peer"` // the BGPPeer
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
	// Selected are those that it is to be told of, by its BGPPeer; Told is the same, or none without a session.
	Selected []netip.Addr `json:"selected,omitempty"`
	Told     []netip.Addr `json:"told,omitempty"`
}
