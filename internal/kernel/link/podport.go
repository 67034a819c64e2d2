package link

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// PodPort is a node's end of a pod's veth pair as the kernel has it.
type PodPort struct {
	Name    string
	Index   int
	HostMAC net.HardwareAddr
	Addrs   []PodAddr
	// Qdiscs are the kinds of its queueing disciplines, but for the one that queues nothing.
	Qdiscs []string
}

// PodAddr is an address of a pod, and the MAC address that it has there.
type PodAddr struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
}

// PodPorts reads the node's ends of all pods' veth pairs, by our marks: what is known of a pod's addresses is what
// routes and neighbours say. One that is being made may have none yet.
func (n *Namespace) PodPorts() ([]PodPort, error) {
	links, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var ports []PodPort
	at := map[int]int{}
	for _, l := range links {
		if a := l.Attrs(); a.Group == PodGroup && l.Type() == "veth" {
			at[a.Index] = len(ports)
			ports = append(ports, PodPort{Name: a.Name, Index: a.Index, HostMAC: a.HardwareAddr})
		}
	}
	if len(ports) == 0 {
		return nil, nil
	}
	macs := map[int]map[netip.Addr]net.HardwareAddr{}
	neighbours, err := dump(func() ([]netlink.Neigh, error) { return n.nl.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	for _, x := range neighbours {
		if _, ours := at[x.LinkIndex]; !ours || x.State&netlink.NUD_PERMANENT == 0 {
			continue
		}
		if macs[x.LinkIndex] == nil {
			macs[x.LinkIndex] = map[netip.Addr]net.HardwareAddr{}
		}
		a, _ := netip.AddrFromSlice(x.IP)
		macs[x.LinkIndex][a.Unmap()] = x.HardwareAddr
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := dump(func() ([]netlink.Route, error) {
			return n.nl.RouteListFiltered(family, &netlink.Route{Protocol: PodRouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes to pods: %w", err)
		}
		for _, r := range routes {
			i, ours := at[r.LinkIndex]
			if !ours || r.Dst == nil {
				continue
			}
			p := prefixOf(r.Dst)
			if mac := macs[r.LinkIndex][p.Addr()]; p.IsSingleIP() && len(mac) == 6 {
				ports[i].Addrs = append(ports[i].Addrs, PodAddr{p.Addr(), mac})
			}
		}
	}
	qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return n.nl.QdiscList(nil) })
	if err != nil {
		return nil, fmt.Errorf("list queueing disciplines: %w", err)
	}
	for _, q := range qdiscs {
		if i, ours := at[q.Attrs().LinkIndex]; ours && q.Type() != "noqueue" {
			ports[i].Qdiscs = append(ports[i].Qdiscs, q.Type())
		}
	}
	return ports, nil
}

// Index returns the index of a device, and whether its frames are Ethernet's.
func (n *Namespace) Index(name string) (index int, ethernet bool, err error) {
	l, err := n.nl.LinkByName(name)
	if err != nil {
		return 0, false, fmt.Errorf("look up device %s: %w", name, err)
	}
	return l.Attrs().Index, l.Attrs().EncapType == "ether", nil
}

// Names returns the names of all devices, by index.
func (n *Namespace) Names() (map[int]string, error) {
	links, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}
