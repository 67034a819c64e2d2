// Package ping has the values of a session of test packets: what the asker wants sent, and what came of it.
package ping

import "net/netip"

// Probe is one question: does a packet of this size get there and back?
type Probe struct {
	From string         `json:"from"` // whose namespace it is sent from, as the asker calls it
	To   netip.AddrPort `json:"to"`
	// Size is that of the IP packet, in bytes. One that is no larger than MTU is sent with "don't fragment".
	Size int `json:"size"`
	MTU  int `json:"mtu"`
}

// Result is the answer.
type Result struct {
	Probe
	// Source is the sender as the listener saw it.
	Source netip.Addr `json:"source"`
	// Seconds is how long the packet took there and back.
	Seconds float64 `json:"seconds"`
	// Error says why there is no answer.
	Error string `json:"error,omitempty"`
}

// Place is a namespace that probes come from and go to: a pod's, or the node's own.
type Place struct {
	Name      string       `json:"name"` // NAMESPACE/POD, or node/NAME
	Addresses []netip.Addr `json:"addresses"`
	Port      uint16       `json:"port"` // where its listener is
	Problem   string       `json:"problem,omitempty"`
	NetNS     string       `json:"-"` // the path of its namespace
}

// Request is a line of a session's input: probes to send.
type Request struct {
	Probes []Probe `json:"probes"`
}

// Response is a line of a session's output: first the places, then the results of each request.
type Response struct {
	Places  []Place  `json:"places,omitempty"`
	Results []Result `json:"results,omitempty"`
}
