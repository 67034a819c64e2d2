package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/bgpconf"
)

// BGP is what a node's agent says of its sessions, and by what it has decided on them. There is no password in it.
type BGP struct {
	// Decided says that it has worked out what to announce since it started.
	Decided bool `json:"decided"`
	// What is so on the node and nobody else knows; ServiceAddresses follow from whom agents hear.
	Links            []bgpconf.Link           `json:"links,omitempty"`
	Heard            map[string]bgpconf.Heard `json:"heard,omitempty"`
	ServiceAddresses []bgpconf.ServiceAddress `json:"serviceAddresses,omitempty"`
	Sessions         []BGPSession             `json:"sessions,omitempty"`
	// Refused is why there is no session with a BGPPeer.
	Refused map[string]string `json:"refused,omitempty"`
	// Aggregates are those of whose addresses the kernel refuses what is for nobody.
	Aggregates []netip.Prefix `json:"aggregates,omitempty"`
}

// BGPSession is a session.
type BGPSession struct {
	Peer    string         `json:"peer"`
	Address netip.AddrPort `json:"address"`
	State   string         `json:"state"`
	Reason  string         `json:"reason,omitempty"`
	// Told are the routes that the router is told, or will be when the session is up.
	Told []bgpconf.Route `json:"told,omitempty"`
}
