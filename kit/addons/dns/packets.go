package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/coredns/coredns/plugin/pkg/reuseport"
	"golang.org/x/sys/unix"
)

// packetSockets is how many UDP sockets there are at one address. A power of two.
const packetSockets = 32

// packetBuffer is as much as an ordinary user's socket may hold of what it has not read, where nobody has changed
// net.core.rmem_max; with less than that, it is less.
const packetBuffer = 208 << 10

// listenPackets opens the UDP sockets of an address, and has the kernel choose among them by the client's address. A
// packet that comes while its socket is full is lost, and a pod that floods fills one within a millisecond, whatever
// becomes of its queries when they are read: it is to lose its own, and not those of other pods. (That is stochastic
// fairness queueing, McKenney 1990. Its last five bits are what an address is sorted by, since pods of a node have
// addresses in a row: 32 of them never meet.)
//
// In an update those of the new process follow those of the old one in the kernel's list. Until the old one closes its
// own, queries go there, and then the new ones take their places: always there is one at the place that is chosen.
func listenPackets(ctx context.Context, at netip.AddrPort) ([]net.PacketConn, error) {
	var all []net.PacketConn
	fail := func(err error) ([]net.PacketConn, error) {
		for _, c := range all {
			_ = c.Close()
		}
		return nil, err
	}
	for range packetSockets {
		c, err := whenFree(ctx, func() (net.PacketConn, error) { return reuseport.ListenPacket("udp", at.String()) })
		if err != nil {
			return fail(err)
		}
		all = append(all, c)
		if err := c.(*net.UDPConn).SetReadBuffer(packetBuffer); err != nil {
			return fail(fmt.Errorf("set the buffer of a socket at %s: %w", at, err))
		}
	}
	raw, err := all[0].(*net.UDPConn).SyscallConn()
	if err != nil {
		return fail(err)
	}
	attach := raw.Control(func(fd uintptr) {
		program := byClient(at.Addr())
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	})
	if err := errors.Join(attach, err); err != nil {
		// The kernel then chooses by address and port: clients are no less well served while none floods.
		fmt.Fprintf(os.Stderr, "fathom-dns: choose among the sockets at %s by clients' addresses: %v\n", at, err)
	}
	return all, nil
}

// byClient is the classic BPF program (the kernel's networking/filter.rst) that returns the number of a packet's socket:
// the last bits of where it comes from. What it loads is counted from the IP header.
func byClient(listen netip.Addr) []unix.SockFilter {
	last := uint32(12) // of IPv4's source, the one word
	if listen.Is6() {
		last = 8 + 12 // of IPv6's, the last of four
	}
	const fromIP = 0xfff00000 // SKF_NET_OFF of linux/filter.h, -0x100000
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: fromIP + last},
		{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: packetSockets - 1},
		{Code: unix.BPF_RET | unix.BPF_A},
	}
}
