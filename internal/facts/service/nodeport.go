package service

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// NodePortAddrs are the addresses at which NodePorts answer: those in the ranges, or, without ranges, the node's own.
func NodePortAddrs(ranges []netip.Prefix, own podnet.Node, interfaces []podnet.Interface) []netip.Addr {
	addrs := slices.Clone(own.Addrs)
	if len(ranges) > 0 {
		addrs = nil
		for _, i := range interfaces {
			for _, p := range i.Addrs {
				if inet.Contains(ranges, p.Addr()) {
					addrs = append(addrs, p.Addr())
				}
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}
