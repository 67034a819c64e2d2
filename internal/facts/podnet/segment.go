package podnet

import (
	"net/netip"
	"slices"
)

// Segment is a network that a device of the node is on.
type Segment struct {
	Device string       `json:"device"`
	Prefix netip.Prefix `json:"prefix"` // an address of the device with the length of the prefix
}

// Segments are those that a node's devices are on.
func Segments(devices []Interface) []Segment {
	var all []Segment
	for _, i := range devices {
		for _, p := range i.Addrs {
			all = append(all, Segment{Device: i.Name, Prefix: p})
		}
	}
	return all
}

// On returns the devices whose segment an address is on, each once.
func On(addr netip.Addr, segments []Segment) []string {
	var names []string
	for _, s := range segments {
		if s.Prefix.Contains(addr) && s.Prefix.Addr() != addr && !slices.Contains(names, s.Device) {
			names = append(names, s.Device)
		}
	}
	return names
}
