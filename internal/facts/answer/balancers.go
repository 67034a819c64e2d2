package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// Balancers is an agent's report on the Services' addresses that it and other agents announce: what it does itself, and what it
// expects the others to do. It depends on the membership, so agents that do not hear each other report different things.
type Balancers struct {
	// Waiting says what the agent has to know before it decides. Until then its earlier decisions stay in force.
	Waiting string `json:"waiting,omitempty"`
	// Problem is why the agent does not answer for addresses that it should answer for.
	Problem   string        `json:"problem,omitempty"`
	Addresses []vip.Verdict `json:"addresses"`
	// Segments, Alive and Away are what the agent derives Addresses from, besides the API's objects: the networks of the node, the
	// nodes that it considers alive, and those of them whose agents are away.
	Segments []podnet.Segment `json:"segments,omitempty"`
	Alive    []string         `json:"alive,omitempty"`
	Away     []string         `json:"away,omitempty"`
	Routers  []Router         `json:"routers,omitempty"`
	// Keys are the names (keyset.ID) of the membership's keys that the agent accepts. It encrypts with the first one. An agent that
	// has not joined the membership has none.
	Keys []string `json:"keys,omitempty"`
}

// Router is a BGP router to which a node announces Services' addresses.
type Router struct {
	Peer    string `json:"peer"` // the BGPPeer
	State   string `json:"state"`
	Message string `json:"message,omitempty"`
	// Selected are the addresses that its BGPPeer selects. Told are those that the node announces: the same, or none without a
	// session.
	Selected []netip.Addr `json:"selected,omitempty"`
	Told     []netip.Addr `json:"told,omitempty"`
}
