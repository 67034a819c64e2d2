package podroute

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// tunnels lists the names of the vxlan devices with our mark.
func (s *setter) tunnels() ([]string, error) {
	kind := nlmsg.Request(nil).Attr(unix.IFLA_INFO_KIND, []byte("vxlan"))
	var names []string
	err := s.conn.Dump(nlmsg.New(unix.RTM_GETLINK, 0, make([]byte, unix.SizeofIfInfomsg)).Attr(unix.IFLA_LINKINFO|unix.NLA_F_NESTED, kind),
		func(restart bool, b []byte) {
			if restart {
				names = nil
				return
			}
			var name, alias string
			nlmsg.Attrs(b[min(len(b), unix.SizeofIfInfomsg):], func(kind uint16, data []byte) {
				switch kind {
				case unix.IFLA_IFNAME:
					name = unix.ByteSliceToString(data)
				case unix.IFLA_IFALIAS:
					alias = unix.ByteSliceToString(data)
				}
			})
			if alias == podnet.TunnelAlias {
				names = append(names, name)
			}
		})
	if err != nil {
		return nil, fmt.Errorf("list vxlan devices: %w", err)
	}
	slices.Sort(names)
	return names, nil
}

func (s *setter) deleteTunnels(names []string) error {
	for _, name := range names {
		if err := s.n.DeleteDevice(name, podnet.TunnelAlias); err != nil {
			return err
		}
		s.changes.Tunnel.Removed++
	}
	return nil
}

func (s *setter) vxlan(name string) (*netlink.Vxlan, error) {
	l, err := s.n.Netlink().LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("look up device %s: %w", name, err)
	}
	v, is := l.(*netlink.Vxlan)
	if !is {
		return nil, fmt.Errorf("look up device %s: it is of type %s, not vxlan", name, l.Type())
	}
	return v, nil
}

// tunnelOf describes a vxlan device, without its addresses.
func tunnelOf(v *netlink.Vxlan) *podnet.Tunnel {
	t := &podnet.Tunnel{Name: v.Name, VNI: uint32(v.VxlanId), Port: uint16(v.Port), MTU: v.MTU}
	copy(t.MAC[:], v.HardwareAddr)
	if local, ok := netip.AddrFromSlice(v.SrcAddr); ok {
		t.Local = local.Unmap()
	}
	return t
}

// makeTunnel makes the vxlan device or finds it. If an attribute differs that cannot be changed, it recreates the device.
func (s *setter) makeTunnel(t podnet.Tunnel) (*netlink.Vxlan, error) {
	l, err := s.n.Netlink().LinkByName(t.Name)
	switch {
	case rtnl.IsGone(err):
		s.changes.Tunnel.Added++
	case err != nil:
		return nil, fmt.Errorf("look up device %s: %w", t.Name, err)
	default:
		v, is := l.(*netlink.Vxlan)
		// A device without an alias but with our MAC address was made by an agent that was killed right afterwards.
		if !is || v.Alias != podnet.TunnelAlias && (v.Alias != "" || tunnelOf(v).MAC != t.MAC) {
			return nil, fmt.Errorf("make device %s: there is one of that name that is not ours", t.Name)
		}
		if have := tunnelOf(v); have.VNI == t.VNI && have.Port == t.Port && have.Local == t.Local && !v.Learning {
			if have.MTU != t.MTU || have.MAC != t.MAC || v.RawFlags&unix.IFF_UP == 0 {
				s.changes.Tunnel.Corrected++
			}
			return v, nil
		}
		if err := s.n.Netlink().LinkDel(v); err != nil && !rtnl.IsGone(err) {
			return nil, fmt.Errorf("recreate device %s: %w", t.Name, err)
		}
		s.changes.Tunnel.Corrected++
	}
	// There is no lower device: the kernel's routes choose it, packet by packet. The source port is a hash of the inner
	// packet, the kernel's default, so that fabrics spread flows over their paths. UDP checksums are on, the kernel's
	// default too. Without them IPv6 would have to accept packets with a zero checksum (RFC 6935), and such a device cannot
	// share its port with others.
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = t.Name, t.MTU, net.HardwareAddr(t.MAC[:])
	if err := s.n.Netlink().LinkAdd(&netlink.Vxlan{
		LinkAttrs: attrs, VxlanId: int(t.VNI), Port: int(t.Port), SrcAddr: t.Local.AsSlice(),
	}); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("make device %s: another vxlan device has VNI %d on port %d", t.Name, t.VNI, t.Port)
		}
		return nil, fmt.Errorf("make device %s: %w", t.Name, err)
	}
	return s.vxlan(t.Name)
}

// bringUp changes the attributes of the tunnel that can be changed, brings it up, and adds missing addresses. It returns
// the addresses that are no longer wanted, since routes may still have them as source.
func (s *setter) bringUp(v *netlink.Vxlan, t podnet.Tunnel) (stale []netlink.Addr, err error) {
	s.index[v.Name] = v.Index
	if err := s.n.Configure(v, link.Device{Name: t.Name, Alias: podnet.TunnelAlias, MTU: t.MTU, MAC: t.MAC[:]}); err != nil {
		return nil, err
	}
	return s.addAddrs(v, t.Addrs)
}

// addrs lists the tunnel's addresses, except link-local ones that the kernel made.
func (s *setter) addrs(v *netlink.Vxlan) ([]netlink.Addr, error) {
	all, err := rtnl.List(func() ([]netlink.Addr, error) { return s.n.Netlink().AddrList(v, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", v.Name, err)
	}
	return slices.DeleteFunc(all, func(a netlink.Addr) bool { return rtnl.Prefix(a.IPNet).Addr().IsLinkLocalUnicast() }), nil
}

// addAddrs adds the addresses that the tunnel lacks. It returns those that are no longer wanted, since routes may still
// have them as source.
func (s *setter) addAddrs(v *netlink.Vxlan, want []netip.Addr) ([]netlink.Addr, error) {
	have, err := s.addrs(v)
	if err != nil {
		return nil, err
	}
	wanted := make([]netip.Prefix, 0, len(want))
	for _, a := range want {
		wanted = append(wanted, netip.PrefixFrom(a, a.BitLen()))
	}
	missing := len(wanted)
	var stale []netlink.Addr
	for _, a := range have {
		if slices.Contains(wanted, rtnl.Prefix(a.IPNet)) {
			missing--
		} else {
			stale = append(stale, a)
		}
	}
	s.changes.Addrs.Added += missing
	return stale, s.n.AddAddrs(v, wanted, have)
}

func (s *setter) removeAddrs(v *netlink.Vxlan, stale []netlink.Addr) error {
	for i := range stale {
		if err := s.n.Netlink().AddrDel(v, &stale[i]); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address %s from %s: %w", stale[i].IPNet, v.Name, err)
		}
		s.changes.Addrs.Removed++
	}
	return nil
}
