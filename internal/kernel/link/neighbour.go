package link

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// NeighbourMAC returns a neighbour's MAC address from the kernel's neighbour table of a device, or nil if it has none.
func (n *Namespace) NeighbourMAC(device string, addr netip.Addr) (net.HardwareAddr, error) {
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", device, err)
	}
	all, err := rtnl.List(func() ([]netlink.Neigh, error) { return n.nl.NeighList(l.Attrs().Index, rtnl.Family(addr)) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours on %s: %w", device, err)
	}
	for _, x := range all {
		if known, ok := netip.AddrFromSlice(x.IP); ok && known.Unmap() == addr && len(x.HardwareAddr) == 6 {
			return x.HardwareAddr, nil
		}
	}
	return nil, nil
}
