package cni

import (
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// errBroken is the code of an attachment that is not as ADD made it. Codes from 100 are a plugin's own.
const errBroken uint = 100

// check compares an attachment with the result of its ADD, and with its lease. All that is wrong is told.
func (p plugin) check(args *skel.CmdArgs) error {
	c, err := parse(args, false)
	if err != nil {
		return asError("read the configuration", err)
	}
	if c.prev == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "CHECK needs the prevResult of the ADD", "")
	}
	store, err := lease.Open(c.DataDir, c.CoolDown)
	if err != nil {
		return asError("open the leases", err)
	}
	node, pod, err := namespaces(args.Netns)
	if err != nil {
		return err
	}
	defer node.Close()
	defer pod.Close()
	l, found, err := c.find(node, store)
	if err != nil {
		return asError("check "+c.pod.String(), err)
	}
	if !found {
		return types.NewError(errBroken, "check "+c.pod.String(), "it has no lease in "+c.DataDir)
	}
	want, routes, wrong := c.expected(l)
	more, err := podlink.Check(node, pod, want, routes)
	if err != nil {
		return asError("check "+c.pod.String(), err)
	}
	if wrong = append(wrong, more...); len(wrong) > 0 {
		return types.NewError(errBroken, "check "+c.pod.String(), strings.Join(wrong, "; "))
	}
	return nil
}

// expected takes from the prevResult what is ours: plugins behind us may have added to it, and changed the MTU or
// the MAC address.
func (c *call) expected(l lease.Lease) (want podlink.Pod, routes []link.Route, wrong []string) {
	want = podlink.Pod{Device: l.IfName, HostDevice: l.HostDevice, Alias: alias(l)}
	index, host := -1, false
	for i, d := range c.prev.Interfaces {
		switch {
		case d == nil:
		case d.Sandbox == "" && d.Name == l.HostDevice:
			want.HostMAC, host = parseMAC(d.Mac), true
		case d.Sandbox != "" && d.Name == l.IfName:
			want.MAC, want.MTU, index = parseMAC(d.Mac), d.Mtu, i
		}
	}
	if !host {
		wrong = append(wrong, "prevResult has no interface "+l.HostDevice+" on the node")
	}
	if index < 0 {
		wrong = append(wrong, "prevResult has no interface "+l.IfName+" in the pod")
	}
	for _, ip := range c.prev.IPs {
		if a, ok := addrOf(ip); ok && ip.Interface != nil && *ip.Interface == index {
			want.Addrs = append(want.Addrs, a)
			if !slices.Contains(l.Addresses, a) {
				wrong = append(wrong, "prevResult has the address "+a.String()+", which is not leased")
			}
		}
	}
	for _, a := range l.Addresses {
		if !slices.Contains(want.Addrs, a) {
			wrong = append(wrong, "prevResult has not the address "+a.String()+", which is leased")
		}
	}
	for _, r := range c.prev.Routes {
		if r == nil {
			continue
		}
		to, ok := prefixOf(r.Dst)
		if !ok {
			continue
		}
		via, _ := netip.AddrFromSlice(r.GW)
		gateway := podlink.Gateway(to.Addr())
		if via = via.Unmap(); via == gateway || !via.IsValid() && to.Addr() == gateway {
			routes = append(routes, link.Route{To: to, Via: via})
		}
	}
	return want, routes, wrong
}

func addrOf(ip *types100.IPConfig) (netip.Addr, bool) {
	if ip == nil {
		return netip.Addr{}, false
	}
	a, ok := netip.AddrFromSlice(ip.Address.IP)
	return a.Unmap(), ok
}

func prefixOf(n net.IPNet) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	a = a.Unmap()
	return netip.PrefixFrom(a, ones), ok && bits == a.BitLen()
}

// parseMAC returns nil for what is none: any address will do then.
func parseMAC(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		return nil
	}
	return m
}
