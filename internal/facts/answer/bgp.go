package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/bgpconf"
)

// BGP is an agent's report on its BGP sessions, and on what it derives their routes from. It contains no password.
type BGP struct {
	// Decided says that the agent has computed its routes at least once since it started.
	Decided bool `json:"decided"`
	// Links and Heard are known on the node only. ServiceAddresses depend on the membership.
	Links            []bgpconf.Link           `json:"links,omitempty"`
	Heard            map[string]bgpconf.Heard `json:"heard,omitempty"`
	ServiceAddresses []bgpconf.ServiceAddress `json:"serviceAddresses,omitempty"`
	Sessions         []BGPSession             `json:"sessions,omitempty"`
	// Refused says, by BGPPeer, why the agent opens no session.
	Refused map[string]string `json:"refused,omitempty"`
	// Aggregates are the prefixes within which the kernel rejects packets to addresses that nothing on the node has.
	Aggregates []netip.Prefix `json:"aggregates,omitempty"`
}

// BGPSession is a session with a router.
type BGPSession struct {
	Peer    string         `json:"peer"`
	Address netip.AddrPort `json:"address"`
	State   string         `json:"state"`
	Reason  string         `json:"reason,omitempty"`
	// Told are the routes that the agent announces, or will announce when the session is established.
	Told []bgpconf.Route `json:"told,omitempty"`
}
