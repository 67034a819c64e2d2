package rtnl

import (
	"errors"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// List calls a dump of the netlink library, and repeats it if a concurrent change interrupted it: such a result is
// incomplete.
func List[T any](list func() ([]T, error)) ([]T, error) {
	for {
		all, err := list()
		if errors.Is(err, netlink.ErrDumpInterrupted) || errors.Is(err, unix.EINTR) {
			continue
		}
		return all, err
	}
}

// IsGone reports whether the error says that a device does not exist.
func IsGone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.As(err, &missing) || errors.Is(err, unix.ENODEV)
}

// Family returns the address family of a, such as AF_INET.
func Family(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// Whole returns the prefix that contains only a.
func Whole(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// IPNet converts a prefix to the netlink library's form.
func IPNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// Prefix converts a prefix from the netlink library's form.
func Prefix(n *net.IPNet) netip.Prefix {
	addr, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(addr.Unmap(), ones)
}
