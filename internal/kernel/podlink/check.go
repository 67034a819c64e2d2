package podlink

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// Check compares the kernel with what Add makes of p, and returns the differences. Additional routes in the pod are fine.
// MTU and MAC may be unset in p; then any value will do.
func Check(n, in *link.Namespace, p Pod, routes []link.Route) ([]string, error) {
	var c check
	host, err := n.Netlink().LinkByName(p.HostDevice)
	if err != nil {
		if !rtnl.IsGone(err) {
			return nil, fmt.Errorf("look up device %s: %w", p.HostDevice, err)
		}
		c.wrong("the node has no device %s", p.HostDevice)
	}
	pod, err := in.Netlink().LinkByName(p.Device)
	if err != nil {
		if !rtnl.IsGone(err) {
			return nil, fmt.Errorf("look up device %s: %w", p.Device, err)
		}
		c.wrong("the pod has no device %s", p.Device)
	}
	if len(c) > 0 {
		return c, nil
	}
	h, d := host.Attrs(), pod.Attrs()
	if h.ParentIndex != d.Index || d.ParentIndex != h.Index {
		c.wrong("%s on the node and %s in the pod are not two ends of one pair", h.Name, d.Name)
	}
	c.device(h, p.HostMAC, 0)
	c.device(d, p.MAC, p.MTU)
	if h.Group != Group || h.Alias != p.Alias {
		c.wrong("%s has group %d and alias %q, want %d and %q", h.Name, h.Group, h.Alias, Group, p.Alias)
	}
	if err := c.addresses(in, pod, p.Addrs); err != nil {
		return nil, err
	}
	for _, r := range routes {
		if err := c.route(in, pod, r); err != nil {
			return nil, err
		}
	}
	for _, a := range p.Addrs {
		if err := c.route(n, host, link.Route{To: rtnl.Whole(a)}); err != nil {
			return nil, err
		}
		if err := c.neighbour(n, host, a, d.HardwareAddr); err != nil {
			return nil, err
		}
		if err := c.neighbour(in, pod, Gateway(a), h.HardwareAddr); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// check collects differences.
type check []string

func (c *check) wrong(format string, args ...any) { *c = append(*c, fmt.Sprintf(format, args...)) }

func (c *check) device(a *netlink.LinkAttrs, mac net.HardwareAddr, mtu int) {
	if a.Flags&net.FlagUp == 0 {
		c.wrong("%s is down", a.Name)
	}
	if mac != nil && !bytes.Equal(a.HardwareAddr, mac) {
		c.wrong("%s has the MAC address %s, want %s", a.Name, a.HardwareAddr, mac)
	}
	if mtu != 0 && a.MTU != mtu {
		c.wrong("%s has an MTU of %d, want %d", a.Name, a.MTU, mtu)
	}
}

func (c *check) addresses(n *link.Namespace, l netlink.Link, want []netip.Addr) error {
	have, err := rtnl.List(func() ([]netlink.Addr, error) { return n.Netlink().AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list the addresses of %s: %w", l.Attrs().Name, err)
	}
	there := map[netip.Prefix]bool{}
	for _, a := range have {
		there[rtnl.Prefix(a.IPNet)] = true
	}
	for _, a := range want {
		if !there[rtnl.Whole(a)] {
			c.wrong("%s does not have the address %s", l.Attrs().Name, rtnl.Whole(a))
		}
	}
	return nil
}

func (c *check) route(n *link.Namespace, l netlink.Link, want link.Route) error {
	have, err := rtnl.List(func() ([]netlink.Route, error) {
		return n.Netlink().RouteListFiltered(rtnl.Family(want.To.Addr()), &netlink.Route{LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_OIF)
	})
	if err != nil {
		return fmt.Errorf("list the routes of %s: %w", l.Attrs().Name, err)
	}
	for _, r := range have {
		to := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if want.To.Addr().Is6() {
			to = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if r.Dst != nil {
			to = rtnl.Prefix(r.Dst)
		}
		via, _ := netip.AddrFromSlice(r.Gw)
		if to == want.To && (!want.Via.IsValid() || via.Unmap() == want.Via) {
			return nil
		}
	}
	if want.Via.IsValid() {
		c.wrong("there is no route to %s via %s by %s", want.To, want.Via, l.Attrs().Name)
	} else {
		c.wrong("there is no route to %s by %s", want.To, l.Attrs().Name)
	}
	return nil
}

func (c *check) neighbour(n *link.Namespace, l netlink.Link, a netip.Addr, mac net.HardwareAddr) error {
	have, err := rtnl.List(func() ([]netlink.Neigh, error) { return n.Netlink().NeighList(l.Attrs().Index, rtnl.Family(a)) })
	if err != nil {
		return fmt.Errorf("list the neighbours of %s: %w", l.Attrs().Name, err)
	}
	for _, e := range have {
		ip, _ := netip.AddrFromSlice(e.IP)
		if ip.Unmap() == a && e.State == netlink.NUD_PERMANENT && bytes.Equal(e.HardwareAddr, mac) {
			return nil
		}
	}
	c.wrong("%s has no permanent neighbour %s at %s", l.Attrs().Name, a, mac)
	return nil
}
