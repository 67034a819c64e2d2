package link

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// RouteProtocol marks our routes; `ip route` shows it as "proto 250".
const RouteProtocol = 250

// Device describes one end of a veth pair, or a bridge.
type Device struct {
	Name  string
	Alias string // says what the device is for, and marks it as ours
	MTU   int    // 0 keeps the kernel's default
	MAC   net.HardwareAddr
	// Bridge is the bridge that the device is a port of, or empty.
	Bridge string
}

// Route is a route to a prefix via a gateway.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// State is the state of a device.
type State struct {
	Name    string
	Up      bool
	Carrier bool
	MTU     int
}

// SetBridge makes a bridge, up, and fixes its MAC address. A bridge whose address was never set takes the lowest of its
// ports', and changes it as ports come and go. A neighbour that has the old address cached, such as a node that uses the
// bridge as its gateway, then loses packets until the entry expires.
func (n *Namespace) SetBridge(d Device) error {
	if l, err := n.nl.LinkByName(d.Name); err == nil && l.Type() == "bridge" {
		return n.Configure(l, d)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = d.Name
	if err := n.nl.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("make bridge %s: %w", d.Name, err)
	}
	l, err := n.nl.LinkByName(d.Name)
	if err != nil {
		return err
	}
	mac := d.MAC
	if mac == nil {
		mac = l.Attrs().HardwareAddr
	}
	if err := n.nl.LinkSetHardwareAddr(l, mac); err != nil {
		return fmt.Errorf("fix the MAC address of bridge %s: %w", d.Name, err)
	}
	return n.Configure(l, d)
}

// SetPair makes a veth pair with one end here and one in the peer's namespace, both up. An existing pair is kept if both
// ends are where they should be. A stray end with our alias is replaced; any other device of the same name is an error.
func (n *Namespace) SetPair(here Device, in *Namespace, there Device) error {
	local, errHere := n.nl.LinkByName(here.Name)
	remote, errThere := in.nl.LinkByName(there.Name)
	paired := errHere == nil && errThere == nil && local.Attrs().ParentIndex == remote.Attrs().Index &&
		remote.Attrs().ParentIndex == local.Attrs().Index
	if !paired {
		for _, end := range []struct {
			n    *Namespace
			l    netlink.Link
			err  error
			want Device
		}{{n, local, errHere, here}, {in, remote, errThere, there}} {
			if end.err != nil {
				continue
			}
			if end.l.Attrs().Alias != end.want.Alias {
				return fmt.Errorf("make device %s: there is one of that name that is not ours", end.want.Name)
			}
			if err := end.n.nl.LinkDel(end.l); err != nil && !rtnl.IsGone(err) {
				return fmt.Errorf("replace device %s: %w", end.want.Name, err)
			}
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = here.Name
		if here.MAC != nil {
			attrs.HardwareAddr = here.MAC
		}
		if err := n.nl.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: there.Name, PeerHardwareAddr: there.MAC,
			PeerNamespace: netlink.NsFd(int(in.file.Fd())),
		}); err != nil {
			return fmt.Errorf("make veth pair %s and %s: %w", here.Name, there.Name, err)
		}
		var err error
		if local, err = n.nl.LinkByName(here.Name); err != nil {
			return err
		}
		if remote, err = in.nl.LinkByName(there.Name); err != nil {
			return err
		}
	}
	if err := n.Configure(local, here); err != nil {
		return err
	}
	return in.Configure(remote, there)
}

// Configure gives an existing device the properties of d, and brings it up.
func (n *Namespace) Configure(l netlink.Link, d Device) error {
	a := l.Attrs()
	if a.Alias != d.Alias {
		if err := n.nl.LinkSetAlias(l, d.Alias); err != nil {
			return fmt.Errorf("set the alias of %s: %w", d.Name, err)
		}
	}
	if d.MTU != 0 && a.MTU != d.MTU {
		if err := n.nl.LinkSetMTU(l, d.MTU); err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", d.Name, d.MTU, err)
		}
	}
	if d.MAC != nil && !bytes.Equal(a.HardwareAddr, d.MAC) {
		if err := n.nl.LinkSetHardwareAddr(l, d.MAC); err != nil {
			return fmt.Errorf("set the MAC address of %s: %w", d.Name, err)
		}
	}
	if d.Bridge != "" {
		b, err := n.nl.LinkByName(d.Bridge)
		if err != nil {
			return fmt.Errorf("join bridge %s: %w", d.Bridge, err)
		}
		if a.MasterIndex != b.Attrs().Index {
			if err := n.nl.LinkSetMaster(l, b); err != nil {
				return fmt.Errorf("make %s a port of bridge %s: %w", d.Name, d.Bridge, err)
			}
		}
	}
	if err := n.nl.LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", d.Name, err)
	}
	return nil
}

// SetAddrs gives the device exactly these addresses, apart from link-local ones.
func (n *Namespace) SetAddrs(device string, want []netip.Prefix) error {
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return fmt.Errorf("set the addresses of %s: %w", device, err)
	}
	wanted := map[netip.Prefix]bool{}
	for _, p := range want {
		wanted[p] = true
	}
	for {
		have, err := rtnl.List(func() ([]netlink.Addr, error) { return n.nl.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return fmt.Errorf("list the addresses of %s: %w", device, err)
		}
		if err := n.AddAddrs(l, want, have); err != nil {
			return err
		}
		removed := false
		for i, a := range have {
			p := rtnl.Prefix(a.IPNet)
			if wanted[p] || p.Addr().IsLinkLocalUnicast() || p.Addr().IsLoopback() {
				continue
			}
			if err := n.nl.AddrDel(l, &have[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove address %s from %s: %w", p, device, err)
			}
			removed = true
		}
		if !removed {
			return nil
		}
		// Removing an address may remove addresses of its subnet that were added after it: list them again.
	}
}

// AddAddrs adds the wanted addresses that the device lacks, and waits until they are usable.
func (n *Namespace) AddAddrs(l netlink.Link, want []netip.Prefix, have []netlink.Addr) error {
	present := map[netip.Prefix]bool{}
	for _, a := range have {
		present[rtnl.Prefix(a.IPNet)] = true
	}
	for _, p := range want {
		if present[p] {
			continue
		}
		addr := &netlink.Addr{IPNet: rtnl.IPNet(p)}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD // addresses are unique: the plan assigns each once
		}
		if err := n.nl.AddrAdd(l, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s to %s: %w", p, l.Attrs().Name, err)
		}
		if err := n.AwaitLocal(l, p.Addr()); err != nil {
			return fmt.Errorf("add address %s to %s: %w", p, l.Attrs().Name, err)
		}
	}
	return nil
}

// settlePatience bounds the wait for a kernel that is busy with devices.
const settlePatience = 10 * time.Second

// AwaitLocal waits until the kernel accepts packets to an address of a device that is up. For IPv4 it does as soon as the
// address is added. For IPv6 it makes the route later, from a work queue (addrconf_dad_work), even without duplicate
// address detection, and drops packets that arrive before.
func (n *Namespace) AwaitLocal(l netlink.Link, a netip.Addr) error {
	if l.Attrs().Flags&net.FlagUp == 0 || a.Is4() || a.IsLinkLocalUnicast() {
		return nil
	}
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		routes, err := n.nl.RouteGet(a.AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Since(began) > settlePatience {
			return fmt.Errorf("address %s is not usable after %s (routes %v, %w)", a, settlePatience, routes, err)
		}
	}
}

// SetRoutes makes these routes, marked as ours, and removes other routes with our mark.
func (n *Namespace) SetRoutes(want []Route) error { return n.setRoutes(0, want) }

// SetDeviceRoutes is SetRoutes limited to the routes of one device.
func (n *Namespace) SetDeviceRoutes(device string, want []Route) error {
	l, err := n.nl.LinkByName(device)
	if err != nil {
		return fmt.Errorf("set routes by %s: %w", device, err)
	}
	return n.setRoutes(l.Attrs().Index, want)
}

func (n *Namespace) setRoutes(device int, want []Route) error {
	filter, mask := &netlink.Route{Protocol: RouteProtocol}, netlink.RT_FILTER_PROTOCOL
	if device != 0 {
		filter.LinkIndex, mask = device, mask|netlink.RT_FILTER_OIF
	}
	have, err := rtnl.List(func() ([]netlink.Route, error) {
		return n.nl.RouteListFiltered(netlink.FAMILY_ALL, filter, mask)
	})
	if err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	wanted := map[netip.Prefix]bool{}
	for _, r := range want {
		wanted[r.To] = true
		route := &netlink.Route{Dst: rtnl.IPNet(r.To), Gw: r.Via.AsSlice(), Protocol: RouteProtocol, LinkIndex: device}
		if err := n.nl.RouteReplace(route); err != nil {
			return fmt.Errorf("route %s via %s: %w", r.To, r.Via, err)
		}
	}
	for i, r := range have {
		if r.Dst == nil || wanted[rtnl.Prefix(r.Dst)] {
			continue
		}
		if err := n.nl.RouteDel(&have[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("remove the route to %s: %w", r.Dst, err)
		}
	}
	return nil
}

// Routed returns the destinations of every route of the namespace, whoever made them.
func (n *Namespace) Routed() ([]netip.Prefix, error) {
	routes, err := rtnl.List(func() ([]netlink.Route, error) { return n.nl.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	var all []netip.Prefix
	for _, r := range routes {
		if r.Dst != nil {
			all = append(all, rtnl.Prefix(r.Dst))
		}
	}
	return all, nil
}

// SetUp brings a device up or down.
func (n *Namespace) SetUp(device string, up bool) error {
	l, err := n.nl.LinkByName(device)
	if err == nil && up {
		err = n.nl.LinkSetUp(l)
	} else if err == nil {
		err = n.nl.LinkSetDown(l)
	}
	if err != nil {
		return fmt.Errorf("set device %s up=%v: %w", device, up, err)
	}
	return nil
}

// Device returns the state of a device.
func (n *Namespace) Device(name string) (State, error) {
	l, err := n.nl.LinkByName(name)
	if err != nil {
		return State{}, fmt.Errorf("look up device %s: %w", name, err)
	}
	a := l.Attrs()
	return State{Name: name, Up: a.Flags&net.FlagUp != 0, Carrier: a.OperState == netlink.OperUp, MTU: a.MTU}, nil
}

// DeleteDevice deletes a device if it has our alias. A device that does not exist is not an error.
func (n *Namespace) DeleteDevice(name, alias string) error {
	l, err := n.nl.LinkByName(name)
	if err == nil && l.Attrs().Alias != alias {
		return fmt.Errorf("delete device %s: it is not ours (alias %q)", name, l.Attrs().Alias)
	}
	if err == nil {
		err = n.nl.LinkDel(l)
	}
	if err != nil && !rtnl.IsGone(err) {
		return fmt.Errorf("delete device %s: %w", name, err)
	}
	return nil
}

// Index returns the index of a device, and whether it is an Ethernet device.
func (n *Namespace) Index(name string) (index int, ethernet bool, err error) {
	l, err := n.nl.LinkByName(name)
	if err != nil {
		return 0, false, fmt.Errorf("look up device %s: %w", name, err)
	}
	return l.Attrs().Index, l.Attrs().EncapType == "ether", nil
}

// Names returns the names of all devices, by index.
func (n *Namespace) Names() (map[int]string, error) {
	links, err := rtnl.List(n.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// LocalAddrs returns the addresses of all devices.
func (n *Namespace) LocalAddrs() (map[netip.Addr]bool, error) {
	all, err := rtnl.List(func() ([]netlink.Addr, error) { return n.nl.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	local := make(map[netip.Addr]bool, len(all))
	for _, a := range all {
		local[rtnl.Prefix(a.IPNet).Addr()] = true
	}
	return local, nil
}
