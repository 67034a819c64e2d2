package podnet

import "net/netip"

// PodEnd is the node's end of a pod's pair of devices, and what the node has to reach the pod by it.
type PodEnd struct {
	Device     string       `json:"device"`
	Alias      string       `json:"alias"`
	MTU        int          `json:"mtu"`
	Routes     []netip.Addr `json:"routes"`
	Neighbours []netip.Addr `json:"neighbours"`
	// Sources are the node's own addresses from which it talks to the pod, by the pod's, where its routes name any.
	Sources map[netip.Addr]netip.Addr `json:"sources,omitempty"`
}
