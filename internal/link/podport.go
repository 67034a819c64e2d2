package link

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
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

// Do runs f on a thread in the namespace. f must start no goroutine.
func (n *Namespace) Do(f func() error) error { return n.do(f) }

// settle is how long WatchPods waits for more: the plugin makes a device in several steps, and plugins after it go on.
const settle = 50 * time.Millisecond

// WatchPods tells of pods' devices that come, go or get other queueing disciplines. Several changes come as one.
// It ends with the context.
func (n *Namespace) WatchPods(ctx context.Context, changed func()) error {
	fd := -1
	err := n.do(func() error {
		var err error
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
		return err
	})
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK,
			Groups: unix.RTMGRP_LINK | unix.RTMGRP_TC | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE})
	}
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: settle.Microseconds()})
	}
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return fmt.Errorf("watch pods' devices: %w", err)
	}
	go func() {
		defer unix.Close(fd)
		buf := make([]byte, 64<<10)
		var since time.Time // of the first change that was not told yet
		for ctx.Err() == nil {
			size, _, err := unix.Recvfrom(fd, buf, 0)
			switch {
			case errors.Is(err, unix.ENOBUFS): // some were lost
				since = time.Now().Add(-settle)
			case err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR):
				time.Sleep(settle)
			case err == nil && since.IsZero() && isPodChange(buf[:size]):
				since = time.Now()
			}
			if !since.IsZero() && time.Since(since) >= settle {
				since = time.Time{}
				changed()
			}
		}
	}()
	return nil
}

// isPodChange says whether any of the messages is of a pod's device. Those of queueing disciplines do not tell.
func isPodChange(b []byte) bool {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > len(b) {
			return true
		}
		body := b[unix.NLMSG_HDRLEN:length]
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.RTM_NEWQDISC, unix.RTM_DELQDISC, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
			return true
		case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			if len(body) >= unix.SizeofRtMsg && body[5] == PodRouteProtocol {
				return true
			}
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			found := false
			attrs(body[min(len(body), unix.SizeofIfInfomsg):], func(kind uint16, data []byte) {
				found = found || kind == unix.IFLA_GROUP && len(data) == 4 && binary.NativeEndian.Uint32(data) == PodGroup
			})
			if found {
				return true
			}
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return false
}
