package rtnl

import (
	"errors"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// List repeats a dump of the netlink library's that a concurrent change interrupted: it is never taken as the truth.
func List[T any](list func() ([]T, error)) ([]T, error) {
	for {
		all, err := list()
		if errors.Is(err, netlink.ErrDumpInterrupted) || errors.Is(err, unix.EINTR) {
			continue
		}
		return all, err
	}
}

// IsGone says whether the error is that a device is not there.
func IsGone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

// Family is the address family of a, as requests have it.
func Family(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// Whole is the prefix of one address.
func Whole(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// IPNet writes a prefix as the netlink library takes it.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Prefix reads a prefix as the netlink library gives it.
func Prefix(n *net.IPNet) netip.Prefix {
	addr, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones)
}
