package fastpath_test

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// What follows makes packets from the inside out, false ones as well as true ones.

func checksum(sum uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	return sum
}

func folded(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// summed writes the checksum of a transport header at an offset, over the pseudo header too.
func summed(src, dst netip.Addr, protocol byte, b []byte, at int) []byte {
	sum := checksum(uint32(protocol)+uint32(len(b)), slices.Concat(src.AsSlice(), dst.AsSlice(), b))
	binary.BigEndian.PutUint16(b[at:], folded(sum))
	return b
}

// udpTo is a datagram.
func udpTo(src, dst netip.Addr, port uint16, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, 4000)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return summed(src, dst, unix.IPPROTO_UDP, append(append(b, 0, 0), payload...), 6)
}

// ip4 is a packet; options are padded already. fragment is the field of flags and offset.
func ip4(src, dst netip.Addr, protocol byte, fragment uint16, options, payload []byte) []byte {
	b := []byte{0x40 | byte(5+len(options)/4), 0}
	b = binary.BigEndian.AppendUint16(b, uint16(20+len(options)+len(payload)))
	b = binary.BigEndian.AppendUint16(append(b, 0, 7), fragment)
	b = slices.Concat(append(b, 64, protocol, 0, 0), src.AsSlice(), dst.AsSlice(), options)
	binary.BigEndian.PutUint16(b[10:], folded(checksum(0, b)))
	return append(b, payload...)
}

// ip6 is a packet; next is what its payload begins with.
func ip6(src, dst netip.Addr, next, hops byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0x60, 0, 0, 0}, uint16(len(payload)))
	return slices.Concat(append(b, next, hops), src.AsSlice(), dst.AsSlice(), payload)
}

// datagram is a packet with a datagram in it.
func datagram(src, dst netip.Addr, port uint16, payload []byte) []byte {
	if src.Is4() {
		return ip4(src, dst, unix.IPPROTO_UDP, 0, nil, udpTo(src, dst, port, payload))
	}
	return ip6(src, dst, unix.IPPROTO_UDP, 64, udpTo(src, dst, port, payload))
}

// ether is a frame; tags, each a type and an ID, come before the packet's own type.
func ether(from, to net.HardwareAddr, packet []byte, tags ...[2]uint16) []byte {
	b := slices.Concat(to, from)
	for _, tag := range tags {
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, tag[0]), tag[1])
	}
	kind := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(b, kind), packet...)
}

// vxlan is what goes into a datagram to a tunnel.
func vxlan(vni uint32, frame []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{8, 0, 0, 0}, vni<<8), frame...)
}

// icmp6 is a message of neighbour discovery.
func icmp6(src, dst netip.Addr, message []byte) []byte {
	return ip6(src, dst, unix.IPPROTO_ICMPV6, 255, summed(src, dst, unix.IPPROTO_ICMPV6, message, 2))
}

// advertisement says that a neighbour has an address, and overrides what was said before (RFC 4861, section 4.4).
func advertisement(target netip.Addr, mac net.HardwareAddr) []byte {
	return slices.Concat([]byte{136, 0, 0, 0, 0xe0, 0, 0, 0}, target.AsSlice(), []byte{2, 1}, mac)
}

// solicitation asks for a neighbour, and says where the one that asks is.
func solicitation(target netip.Addr, mac net.HardwareAddr) []byte {
	return slices.Concat([]byte{135, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), []byte{1, 1}, mac)
}

// router is the advertisement of one, with a prefix to make addresses of (RFC 4861, section 4.2).
func router(prefix netip.Addr, mac net.HardwareAddr) []byte {
	return slices.Concat([]byte{134, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}, mac,
		[]byte{3, 4, 64, 0xc0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, prefix.AsSlice())
}

// redirect6 says that a destination is better reached by another neighbour; redirect4 is the same for IPv4.
func redirect6(target, destination netip.Addr) []byte {
	return slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice(), destination.AsSlice())
}

func redirect4(src, dst, gateway netip.Addr, about []byte) []byte {
	b := slices.Concat([]byte{5, 1, 0, 0}, gateway.AsSlice(), about)
	binary.BigEndian.PutUint16(b[2:], folded(checksum(0, b)))
	return ip4(src, dst, unix.IPPROTO_ICMP, 0, nil, b)
}
