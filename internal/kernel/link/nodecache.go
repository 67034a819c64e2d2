package link

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// nodeCacheLabel marks IPv4 addresses of the loopback device as ours; `ip address` shows it. IPv6 addresses have no labels:
// nodeCacheRange marks those, since nothing else uses it.
const nodeCacheLabel = "lo:fathom"

var nodeCacheRange = netip.MustParsePrefix("fd66:6174:686f::/48")

// SetNodeCacheAddrs gives the loopback device the addresses of the node's DNS cache, in this order, and removes other
// addresses with our mark. Their scope is host, so they are never the source of packets to other hosts. It skips a family
// that the kernel has disabled. It returns how many addresses it added and removed.
func (n *Namespace) SetNodeCacheAddrs(want []netip.Addr) (changed int, err error) {
	l, err := n.nl.LinkByName("lo")
	if err != nil {
		return 0, fmt.Errorf("give the node the addresses of its DNS cache: find lo: %w", err)
	}
	have, err := rtnl.List(func() ([]netlink.Addr, error) { return n.nl.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return 0, fmt.Errorf("list the addresses of lo: %w", err)
	}
	for _, addr := range want {
		if slices.ContainsFunc(have, func(a netlink.Addr) bool { return rtnl.Prefix(a.IPNet).Addr() == addr }) {
			continue
		}
		a := &netlink.Addr{IPNet: rtnl.IPNet(rtnl.Whole(addr)), Scope: unix.RT_SCOPE_HOST}
		if addr.Is4() {
			a.Label = nodeCacheLabel
		} else {
			a.Flags = unix.IFA_F_NODAD
		}
		err := n.nl.AddrAdd(l, a)
		// EACCES means that disable_ipv6 is set, and EOPNOTSUPP that the kernel lacks IPv6.
		if addr.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT)) {
			continue
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return changed, fmt.Errorf("add address %s to lo: %w", addr, err)
		}
		changed++
		if err := n.AwaitLocal(l, addr); err != nil {
			return changed, fmt.Errorf("add address %s to lo: %w", addr, err)
		}
	}
	for i, a := range have {
		addr := rtnl.Prefix(a.IPNet).Addr()
		if ours := a.Label == nodeCacheLabel || nodeCacheRange.Contains(addr); !ours || slices.Contains(want, addr) {
			continue
		}
		if err := n.nl.AddrDel(l, &have[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return changed, fmt.Errorf("remove address %s from lo: %w", addr, err)
		}
		changed++
	}
	return changed, nil
}
