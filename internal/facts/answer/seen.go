package answer

import "net/netip"

// SeenFlows are the connections of pods that an agent sees on its node: those that its kernel tracks, those of its pods' sockets, and those
// that were recorded as accepted.
type SeenFlows struct {
	Flows []SeenFlow `json:"flows"`
	// More says that there are more.
	More bool `json:"more,omitempty"`
}

// SeenFlow is a connection as policies judge it: to the pod that answers, whatever its client believes.
type SeenFlow struct {
	From     netip.Addr `json:"from"`
	To       netip.Addr `json:"to"`
	Protocol uint8      `json:"protocol"`
	Port     uint16     `json:"port"`
}
