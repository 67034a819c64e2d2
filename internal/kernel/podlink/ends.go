package podlink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Ends returns the node's end of each pod's pair of devices, with the routes and neighbours by which the node reaches the
// pod. strays are the destinations of routes to pods that lead to no such device.
func Ends(n *link.Namespace) (ends []podnet.PodEnd, strays []netip.Addr, err error) {
	links, err := rtnl.List(n.Netlink().LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list devices: %w", err)
	}
	at := map[int]int{} // index of the device to place in ends
	for _, l := range links {
		if a := l.Attrs(); a.Group == Group && l.Type() == "veth" {
			at[a.Index] = len(ends)
			ends = append(ends, podnet.PodEnd{Device: a.Name, Alias: a.Alias, MTU: a.MTU})
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := rtnl.List(func() ([]netlink.Route, error) {
			return n.Netlink().RouteListFiltered(family, &netlink.Route{Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, nil, fmt.Errorf("list routes to pods: %w", err)
		}
		for _, r := range routes {
			to := rtnl.Prefix(r.Dst).Addr()
			if i, found := at[r.LinkIndex]; found {
				ends[i].Routes = append(ends[i].Routes, to)
				if from, ok := netip.AddrFromSlice(r.Src); ok {
					if ends[i].Sources == nil {
						ends[i].Sources = map[netip.Addr]netip.Addr{}
					}
					ends[i].Sources[to] = from.Unmap()
				}
			} else {
				strays = append(strays, to)
			}
		}
		neighbours, err := rtnl.List(func() ([]netlink.Neigh, error) { return n.Netlink().NeighList(0, family) })
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

// Repair restores the node's side of a pod to what Add made, and sets both ends to the MTU that p wants now. It does not
// make devices again: if a pod has lost its own, the runtime has to recreate the pod. What vanishes during Repair is not an
// error.
func Repair(n, in *link.Namespace, p Pod) error {
	err := repair(n, in, p)
	if rtnl.IsGone(err) {
		return nil
	}
	return err
}

func repair(n, in *link.Namespace, p Pod) error {
	host, err := n.Netlink().LinkByName(p.HostDevice)
	if err != nil {
		return fmt.Errorf("look up device %s: %w", p.HostDevice, err)
	}
	pod, err := in.Netlink().LinkByName(p.Device)
	if err != nil {
		return fmt.Errorf("look up device %s in a pod: %w", p.Device, err)
	}
	// The order of the ends does not matter: neither fragments.
	if p.MTU != 0 && host.Attrs().MTU != p.MTU {
		for ns, l := range map[*link.Namespace]netlink.Link{n: host, in: pod} {
			if err := ns.Netlink().LinkSetMTU(l, p.MTU); err != nil {
				return fmt.Errorf("set the MTU of %s to %d: %w", l.Attrs().Name, p.MTU, err)
			}
		}
	}
	for _, a := range p.Addrs {
		if err := setNeighbour(n, host, a, pod.Attrs().HardwareAddr); err != nil {
			return err
		}
		if err := setRoute(n, routeTo(host, a, p.Sources)); err != nil {
			return err
		}
	}
	return nil
}
