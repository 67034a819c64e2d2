package podlink

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Port is the node's end of a pod's veth pair as the kernel has it.
type Port struct {
	Name    string
	Index   int
	HostMAC net.HardwareAddr
	Addrs   []Addr
	// Qdiscs are the kinds of its queueing disciplines, except noqueue.
	Qdiscs []string
}

// Addr is an address of a pod, with the MAC address that the node knows for it.
type Addr struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
}

// Ports reads the node's ends of all pods' veth pairs, by their marks. The pods' addresses are those of routes and
// neighbours. A port that is being made may have none yet.
func Ports(n *link.Namespace) ([]Port, error) {
	links, err := rtnl.List(n.Netlink().LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var ports []Port
	at := map[int]int{}
	for _, l := range links {
		if a := l.Attrs(); a.Group == Group && l.Type() == "veth" {
			at[a.Index] = len(ports)
			ports = append(ports, Port{Name: a.Name, Index: a.Index, HostMAC: a.HardwareAddr})
		}
	}
	if len(ports) == 0 {
		return nil, nil
	}
	macs := map[int]map[netip.Addr]net.HardwareAddr{}
	neighbours, err := rtnl.List(func() ([]netlink.Neigh, error) { return n.Netlink().NeighList(0, netlink.FAMILY_ALL) })
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
		routes, err := rtnl.List(func() ([]netlink.Route, error) {
			return n.Netlink().RouteListFiltered(family, &netlink.Route{Protocol: RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes to pods: %w", err)
		}
		for _, r := range routes {
			i, ours := at[r.LinkIndex]
			if !ours || r.Dst == nil {
				continue
			}
			p := rtnl.Prefix(r.Dst)
			if mac := macs[r.LinkIndex][p.Addr()]; p.IsSingleIP() && len(mac) == 6 {
				ports[i].Addrs = append(ports[i].Addrs, Addr{p.Addr(), mac})
			}
		}
	}
	qdiscs, err := rtnl.List(func() ([]netlink.Qdisc, error) { return n.Netlink().QdiscList(nil) })
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
