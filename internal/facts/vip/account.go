package vip

import "net/netip"

// Account is what a node's agent says of Services' addresses that the network outside is led to: what it does, and what it takes others to do. Nobody
// else can know: it follows from what agents hear of each other, and two who cannot hear each other differ.
type Account struct {
	// Waiting says what has to be known before anything is decided; what was decided before stays.
	Waiting string `json:"waiting,omitempty"`
	// Problem is why addresses that it should answer for are not answered for.
	Problem   string    `json:"problem,omitempty"`
	Addresses []Verdict `json:"addresses"`
	Routers   []Router  `json:"routers,omitempty"`
	// Keys are the names (keyset.ID) of the keys by which the agent and others know each other: first the one that it encrypts
	// with. An agent that is no member has none.
	Keys []string `json:"keys,omitempty"`
}

// Verdict is what a node makes of an address.
type Verdict struct {
	Address netip.Addr `json:"address"`
	// Devices are those of its own on whose segments the address is.
	Devices []string `json:"devices,omitempty"`
	// Eligible are all nodes that may take packets for the address.
	Eligible []string `json:"eligible,omitempty"`
	// Announcer is the node that it takes to answer for the address on these segments. Empty if nobody does.
	Announcer string `json:"announcer,omitempty"`
	// Answers says whether that is itself.
	Answers bool `json:"answers,omitempty"`
	// StandIn is the node that says, while the announcer's agent is away, that packets are to go to the announcer.
	StandIn string `json:"standIn,omitempty"`
	// Routed says whether it is told to routers that ask for such addresses.
	Routed bool `json:"routed,omitempty"`
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
