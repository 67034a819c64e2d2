package link

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// PodEnds returns the node's end of each pod's pair of devices with what the node has to reach the pod by it, and
// the destinations of routes to pods that lead to no such device.
func (n *Namespace) PodEnds() (ends []podnet.PodEnd, strays []netip.Addr, err error) {
	links, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list devices: %w", err)
	}
	at := map[int]int{} // index of the device to place in ends
	for _, l := range links {
		if a := l.Attrs(); a.Group == PodGroup && l.Type() == "veth" {
			at[a.Index] = len(ends)
			ends = append(ends, podnet.PodEnd{Device: a.Name, Alias: a.Alias, MTU: a.MTU})
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

// RepairPod makes what the node has for a pod what AddPod made of it, and the MTU of both ends what it should be
// now. Devices are not made again: a pod that has lost its own is the runtime's to make anew. What goes while it is
// looked at is not an error.
func (n *Namespace) RepairPod(in *Namespace, p Pod) error {
	err := n.repairPod(in, p)
	if isGone(err) {
		return nil
	}
	return err
}

func (n *Namespace) repairPod(in *Namespace, p Pod) error {
	host, err := n.nl.LinkByName(p.HostDevice)
	if err != nil {
		return fmt.Errorf("look up device %s: %w", p.HostDevice, err)
	}
	pod, err := in.nl.LinkByName(p.Device)
	if err != nil {
		return fmt.Errorf("look up device %s in a pod: %w", p.Device, err)
	}
	// The node's end first where it grows and last where it shrinks would be no better: neither end fragments.
	if p.MTU != 0 && host.Attrs().MTU != p.MTU {
		for ns, l := range map[*Namespace]netlink.Link{n: host, in: pod} {
			if err := ns.nl.LinkSetMTU(l, p.MTU); err != nil {
				return fmt.Errorf("set the MTU of %s to %d: %w", l.Attrs().Name, p.MTU, err)
			}
		}
	}
	for _, a := range p.Addrs {
		if err := n.setNeighbour(host, a, pod.Attrs().HardwareAddr); err != nil {
			return err
		}
		if err := n.setPodRoute(podRoute(host, a, p.Sources)); err != nil {
			return err
		}
	}
	return nil
}
