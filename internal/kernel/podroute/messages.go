package podroute

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// defaultMetric6 is the metric that the kernel gives an IPv6 route without one.
const defaultMetric6 = 1024

// ndaProtocol is NDA_PROTOCOL of linux/neighbour.h, which x/sys lacks: it marks the creator of an entry.
const ndaProtocol = 12

// routeRequest adds or removes a route. To remove one, type and scope stay unspecified: our protocol and the rest identify
// it.
func routeRequest(kind, flags uint16, device int, r podnet.Route) nlmsg.Request {
	body := make([]byte, unix.SizeofRtMsg)
	body[0], body[1] = byte(rtnl.Family(r.To.Addr())), byte(r.To.Bits())
	body[4], body[5] = unix.RT_TABLE_MAIN, podnet.RouteProtocol
	body[6], body[7] = unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST
	switch {
	case kind == unix.RTM_DELROUTE:
		body[6], body[7] = unix.RT_SCOPE_NOWHERE, unix.RTN_UNSPEC
	case r.Unreachable:
		body[7] = unix.RTN_UNREACHABLE
	}
	if r.Onlink && kind == unix.RTM_NEWROUTE {
		binary.NativeEndian.PutUint32(body[8:], unix.RTNH_F_ONLINK)
	}
	m := nlmsg.New(kind, flags, body).Attr(unix.RTA_DST, r.To.Addr().AsSlice())
	if r.Via.IsValid() {
		m = m.Attr(unix.RTA_GATEWAY, r.Via.AsSlice())
	}
	if device != 0 {
		m = m.Uint32(unix.RTA_OIF, uint32(device))
	}
	if r.Source.IsValid() {
		m = m.Attr(unix.RTA_PREFSRC, r.Source.AsSlice())
	}
	metric := r.Metric
	if metric == 0 && r.To.Addr().Is6() {
		metric = defaultMetric6
	}
	if metric != 0 {
		m = m.Uint32(unix.RTA_PRIORITY, metric)
	}
	return m
}

// neighbourMessage begins a request about an entry of a device's neighbour table or forwarding database.
func neighbourMessage(kind uint16, family byte, device int, flags byte) nlmsg.Request {
	body := make([]byte, unix.SizeofNdMsg)
	body[0] = family
	binary.NativeEndian.PutUint32(body[4:], uint32(device))
	binary.NativeEndian.PutUint16(body[8:], unix.NUD_PERMANENT)
	body[10] = flags
	var how uint16
	if kind == unix.RTM_NEWNEIGH {
		how = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	}
	return nlmsg.New(kind, how, body)
}

func neighbourRequest(kind uint16, device int, x podnet.Neighbour) nlmsg.Request {
	return neighbourMessage(kind, byte(rtnl.Family(x.Addr)), device, 0).
		Attr(unix.NDA_DST, x.Addr.AsSlice()).Attr(unix.NDA_LLADDR, x.MAC[:]).
		Attr(ndaProtocol, []byte{podnet.RouteProtocol})
}

func forwardRequest(kind uint16, device int, f podnet.Forward) nlmsg.Request {
	m := neighbourMessage(kind, unix.AF_BRIDGE, device, unix.NTF_SELF).Attr(unix.NDA_LLADDR, f.MAC[:])
	if f.To.IsValid() {
		m = m.Attr(unix.NDA_DST, f.To.AsSlice())
	}
	return m
}

// read reads the routes with our mark and, if tunnel is the index of a device and not 0, the tunnel's neighbours and
// forwarding entries.
func (s *setter) read(state *podnet.State, tunnel int) error {
	if err := s.readRoutes(state); err != nil {
		return fmt.Errorf("list routes: %w", err)
	}
	if tunnel == 0 {
		return nil
	}
	if err := s.readNeighbours(state, tunnel); err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	if err := s.readForwards(state, tunnel); err != nil {
		return fmt.Errorf("list forwarding entries: %w", err)
	}
	return nil
}

// routeFound is a route as the kernel returns it: its device is still an index, 0 for none.
type routeFound struct {
	podnet.Route
	device uint32
}

// parseRoute parses struct rtmsg and its attributes. It skips routes without our mark, for kernels that do not filter
// dumps.
func parseRoute(family byte, b []byte) (r routeFound, ok bool) {
	if len(b) < unix.SizeofRtMsg || b[0] != family || b[4] != unix.RT_TABLE_MAIN || b[5] != podnet.RouteProtocol {
		return r, false
	}
	flags := binary.NativeEndian.Uint32(b[8:])
	if flags&unix.RTM_F_CLONED != 0 {
		return r, false
	}
	r.Onlink, r.Unreachable = flags&unix.RTNH_F_ONLINK != 0, b[7] == unix.RTN_UNREACHABLE
	to := netip.IPv6Unspecified()
	if family == unix.AF_INET {
		to = netip.IPv4Unspecified()
	}
	nlmsg.Attrs(b[unix.SizeofRtMsg:], func(kind uint16, data []byte) {
		switch {
		case kind == unix.RTA_DST:
			to, _ = netip.AddrFromSlice(data)
		case kind == unix.RTA_GATEWAY:
			r.Via, _ = netip.AddrFromSlice(data)
		case kind == unix.RTA_PREFSRC:
			r.Source, _ = netip.AddrFromSlice(data)
		case kind == unix.RTA_OIF && len(data) == 4:
			r.device = binary.NativeEndian.Uint32(data)
		case kind == unix.RTA_PRIORITY && len(data) == 4:
			r.Metric = binary.NativeEndian.Uint32(data)
		}
	})
	r.To = netip.PrefixFrom(to, int(b[1]))
	if r.Unreachable {
		r.device = 0 // for IPv6 the kernel says lo
	}
	if family == unix.AF_INET6 && r.Metric == defaultMetric6 {
		r.Metric = 0
	}
	return r, true
}

func (s *setter) readRoutes(state *podnet.State) error {
	var all []routeFound
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		body := make([]byte, unix.SizeofRtMsg)
		body[0], body[4], body[5] = family, unix.RT_TABLE_MAIN, podnet.RouteProtocol
		before := len(all)
		if err := s.conn.Dump(nlmsg.New(unix.RTM_GETROUTE, 0, body), func(restart bool, b []byte) {
			if restart {
				all = all[:before]
				return
			}
			r, ok := parseRoute(family, b)
			if !ok {
				return
			}
			all = append(all, r)
		}); err != nil {
			return err
		}
	}
	names := map[uint32]string{}
	state.Routes = make([]podnet.Route, 0, len(all))
	for _, r := range all {
		if r.device != 0 && names[r.device] == "" {
			l, err := s.n.Netlink().LinkByIndex(int(r.device))
			if rtnl.IsGone(err) {
				continue // the route went with the device
			}
			if err != nil {
				return fmt.Errorf("look up device %d: %w", r.device, err)
			}
			names[r.device] = l.Attrs().Name
			s.index[l.Attrs().Name] = int(r.device)
		}
		r.Device = names[r.device]
		state.Routes = append(state.Routes, r.Route)
	}
	slices.SortFunc(state.Routes, func(a, b podnet.Route) int {
		if c := a.To.Addr().Compare(b.To.Addr()); c != 0 {
			return c
		}
		return cmp.Or(cmp.Compare(a.To.Bits(), b.To.Bits()), cmp.Compare(a.Metric, b.Metric))
	})
	return nil
}

func (s *setter) readNeighbours(state *podnet.State, device int) error {
	request := nlmsg.New(unix.RTM_GETNEIGH, 0, make([]byte, unix.SizeofNdMsg)).Uint32(unix.NDA_IFINDEX, uint32(device))
	err := s.conn.Dump(request, func(restart bool, b []byte) {
		if restart {
			state.Neighbours = nil
			return
		}
		// Entries that are not permanent are the kernel's own, such as those of multicast addresses.
		if !isNeighbourOf(b, device) || binary.NativeEndian.Uint16(b[8:])&unix.NUD_PERMANENT == 0 {
			return
		}
		addr, mac := parseNeighbour(b)
		state.Neighbours = append(state.Neighbours, podnet.Neighbour{Addr: addr, MAC: mac})
	})
	slices.SortFunc(state.Neighbours, func(a, b podnet.Neighbour) int { return a.Addr.Compare(b.Addr) })
	return err
}

func (s *setter) readForwards(state *podnet.State, device int) error {
	body := make([]byte, unix.SizeofNdMsg)
	body[0] = unix.AF_BRIDGE
	request := nlmsg.New(unix.RTM_GETNEIGH, 0, body).Uint32(unix.NDA_IFINDEX, uint32(device))
	err := s.conn.Dump(request, func(restart bool, b []byte) {
		if restart {
			state.Forwards = nil
			return
		}
		if !isNeighbourOf(b, device) {
			return
		}
		to, mac := parseNeighbour(b)
		state.Forwards = append(state.Forwards, podnet.Forward{To: to, MAC: mac})
	})
	slices.SortFunc(state.Forwards, func(a, b podnet.Forward) int {
		return cmp.Or(slices.Compare(a.MAC[:], b.MAC[:]), a.To.Compare(b.To))
	})
	return err
}

// parseNeighbour parses a neighbour or a forwarding entry. Both are struct ndmsg with attributes.
func parseNeighbour(b []byte) (addr netip.Addr, mac podnet.MAC) {
	nlmsg.Attrs(b[unix.SizeofNdMsg:], func(kind uint16, data []byte) {
		switch {
		case kind == unix.NDA_DST:
			addr, _ = netip.AddrFromSlice(data)
		case kind == unix.NDA_LLADDR && len(data) == len(mac):
			mac = podnet.MAC(data)
		}
	})
	return addr, mac
}

func isNeighbourOf(b []byte, device int) bool {
	return len(b) >= unix.SizeofNdMsg && binary.NativeEndian.Uint32(b[4:]) == uint32(device)
}
