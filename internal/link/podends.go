package link

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/nodestate"
)

// PodEnds returns the node's end of each pod's pair of devices with what the node has to reach the pod by it, and
// the destinations of routes to pods that lead to no such device.
func (n *Namespace) PodEnds() (ends []nodestate.PodEnd, strays []netip.Addr, err error) {
	links, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list devices: %w", err)
	}
	at := map[int]int{} // index of the device to place in ends
	for _, l := range links {
		if a := l.Attrs(); a.Group == PodGroup && l.Type() == "veth" {
			at[a.Index] = len(ends)
			ends = append(ends, nodestate.PodEnd{Device: a.Name, Alias: a.Alias, MTU: a.MTU})
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return n.nl.RouteListFiltered(family, &netlink.Route{Protocol: PodRouteProtocol, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, nil, fmt.Errorf("list routes to pods: %w", err)
		}
		for _, r := range routes {
			to := prefixOf(r.Dst).Addr()
			if i, found := at[r.LinkIndex]; found {
				ends[i].Routes = append(ends[i].Routes, to)
			} else {
				strays = append(strays, to)
			}
		}
		neighbours, err := dump(func() ([]netlink.Neigh, error) { return n.nl.NeighList(0, family) })
		if err != nil {
			return nil, nil, fmt.Errorf("list neighbours: %w", err)
		}
		for _, x := range neighbours {
			a, _ := netip.AddrFromSlice(x.IP)
			if i, found := at[x.LinkIndex]; found && x.State&netlink.NUD_PERMANENT != 0 && !a.Unmap().IsMulticast() {
				ends[i].Neighbours = append(ends[i].Neighbours, a.Unmap())
			}
		}
	}
	for _, e := range ends {
		slices.SortFunc(e.Routes, netip.Addr.Compare)
		slices.SortFunc(e.Neighbours, netip.Addr.Compare)
	}
	return ends, strays, nil
}
