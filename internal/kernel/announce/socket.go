package announce

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
)

// A classic BPF program passes on only what is a question: a node may carry millions of packets that are none.
// https://docs.kernel.org/networking/filter.html
var (
	arpRequests = []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: etherHeader + 6}, // operation
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: 1, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 256},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	solicitations = []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: etherHeader + 6}, // next header
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: icmp6, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: etherHeader + ip6Header}, // type
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: solicit, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 256},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
)

// listen opens the device's sockets.
func (d *device) listen() error {
	var err error
	if d.arp, err = d.raw(etherARP, arpRequests); err != nil {
		return fmt.Errorf("listen for ARP: %w", err)
	}
	if d.ndp, err = d.raw(etherIPv6, solicitations); err != nil {
		d.arp.Close()
		return fmt.Errorf("listen for Neighbour Discovery: %w", err)
	}
	return nil
}

// raw opens a socket for frames of a kind. It hears nothing until the filter is in place: only then it is bound.
func (d *device) raw(kind uint16, filter []unix.SockFilter) (*os.File, error) {
	fd := -1
	err := d.node.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return os.NewSyscallError("socket", err)
	})
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		os.NewSyscallError("attach the filter", unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]})),
		os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(kind), Ifindex: d.index})))
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), d.name), nil
}

func networkOrder(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}

// groups are the multicast groups that a device has joined. The kernel tells switches of them, and has the device
// listen. A socket holds only so many of them.
type groups struct {
	joined  map[netip.Addr]int // to the socket that has joined it
	sockets []int
}

// set joins the groups of these addresses, and leaves others.
func (g *groups) set(node *link.Namespace, index int, addrs iter.Seq[netip.Addr]) error {
	want := map[netip.Addr]bool{}
	for a := range addrs {
		if a.Is6() {
			want[solicitedNode(a)] = true
		}
	}
	if g.joined == nil {
		g.joined = map[netip.Addr]int{}
	}
	var errs []error
	for group := range want {
		if _, have := g.joined[group]; have {
			continue
		}
		if err := g.join(node, index, group); err != nil {
			errs = append(errs, fmt.Errorf("join %s: %w", group, err))
		}
	}
	for group, socket := range g.joined {
		if !want[group] {
			_ = unix.SetsockoptIPv6Mreq(socket, unix.IPPROTO_IPV6, unix.IPV6_LEAVE_GROUP, mreq(index, group))
			delete(g.joined, group)
		}
	}
	return errors.Join(errs...)
}

func (g *groups) join(node *link.Namespace, index int, group netip.Addr) error {
	err := error(unix.ENOBUFS)
	for i := len(g.sockets) - 1; i >= 0 && errors.Is(err, unix.ENOBUFS); i-- {
		if err = unix.SetsockoptIPv6Mreq(g.sockets[i], unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, mreq(index, group)); errors.Is(err, unix.ENOMEM) {
			err = unix.ENOBUFS
		}
		if err == nil {
			g.joined[group] = g.sockets[i]
		}
	}
	if !errors.Is(err, unix.ENOBUFS) {
		return err
	}
	fd := -1
	if err := node.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		return os.NewSyscallError("socket", err)
	}); err != nil {
		return err
	}
	g.sockets = append(g.sockets, fd)
	if err := unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, mreq(index, group)); err != nil {
		return err
	}
	g.joined[group] = fd
	return nil
}

func mreq(index int, group netip.Addr) *unix.IPv6Mreq {
	return &unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(index)}
}

func (g *groups) close() {
	for _, fd := range g.sockets {
		_ = unix.Close(fd)
	}
	g.sockets, g.joined = nil, nil
}
