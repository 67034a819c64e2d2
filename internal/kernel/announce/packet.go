package announce

import (
	"encoding/binary"
	"net/netip"
)

// question is one about the owner of an address.
type question struct {
	target netip.Addr
	asker  [6]byte
	from   netip.Addr // of who asks; unspecified while it makes sure that nobody has the address
}

const (
	etherHeader = 14
	etherARP    = 0x0806
	etherIPv6   = 0x86dd
	ip6Header   = 40
	icmp6       = 58
	solicit     = 135 // neighbour solicitation, RFC 4861, 4.3
	advertise   = 136 // neighbour advertisement, 4.4
)

var (
	broadcast = [6]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	allNodes  = netip.MustParseAddr("ff02::1")
)

// parse reads a question out of a frame, if it is one.
func parse(frame []byte) (question, bool) {
	if len(frame) < etherHeader {
		return question{}, false
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherARP:
		return parseARP(frame[etherHeader:])
	case etherIPv6:
		return parseNDP([6]byte(frame[6:12]), frame[etherHeader:])
	}
	return question{}, false
}

// parseARP reads a request for an IPv4 address of Ethernet.
func parseARP(b []byte) (question, bool) {
	const request = "\x00\x01\x08\x00\x06\x04\x00\x01" // Ethernet, IPv4, their lengths, request
	if len(b) < 28 || string(b[:8]) != request {
		return question{}, false
	}
	q := question{asker: [6]byte(b[8:14]), from: netip.AddrFrom4([4]byte(b[14:18])), target: netip.AddrFrom4([4]byte(b[24:28]))}
	// One that announces the address is no question, but somebody else's claim.
	return q, q.from != q.target && unicast(q.asker)
}

// parseNDP reads a neighbour solicitation. The checksum is not looked at: of a packet that another namespace of this
// machine sent it is not filled in.
func parseNDP(source [6]byte, b []byte) (question, bool) {
	if len(b) < ip6Header+24 || b[0]>>4 != 6 || b[6] != icmp6 || b[7] != 255 || int(binary.BigEndian.Uint16(b[4:])) < 24 {
		return question{}, false
	}
	m := b[ip6Header:]
	if m[0] != solicit || m[1] != 0 {
		return question{}, false
	}
	q := question{asker: source, from: netip.AddrFrom16([16]byte(b[8:24])), target: netip.AddrFrom16([16]byte(m[8:24]))}
	options := m[24:min(len(m), int(binary.BigEndian.Uint16(b[4:])))]
	for len(options) >= 8 {
		size := int(options[1]) * 8
		if size == 0 || size > len(options) {
			return question{}, false
		}
		if options[0] == 1 && size == 8 { // source link-layer address
			q.asker = [6]byte(options[2:8])
		}
		options = options[size:]
	}
	return q, !q.target.IsMulticast() && !q.from.IsMulticast() && unicast(q.asker)
}

func unicast(mac [6]byte) bool { return mac[0]&1 == 0 && mac != [6]byte{} }

// answer is a frame that says that the address is at mac.
func (q question) answer(mac [6]byte) []byte {
	if q.target.Is4() {
		return arp(2, mac, q.target, q.asker, q.from)
	}
	if q.from.IsUnspecified() {
		return advertisement(mac, q.target, allNodes, multicast(allNodes), 0)
	}
	const solicited = 0x40
	return advertisement(mac, q.target, q.from, q.asker, solicited)
}

// gratuitous are frames that tell everybody that the address is at mac. Of ARP there are two forms, a question and an
// answer, and some programs heed only one of the two (RFC 5227, 3).
func gratuitous(addr netip.Addr, mac [6]byte) [][]byte {
	if addr.Is4() {
		question := arp(1, mac, addr, broadcast, addr)
		copy(question[etherHeader+18:], make([]byte, 6)) // what is asked for is not known
		return [][]byte{question, arp(2, mac, addr, broadcast, addr)}
	}
	return [][]byte{advertisement(mac, addr, allNodes, multicast(allNodes), 0)}
}

func ether(destination, source [6]byte, kind uint16, size int) []byte {
	b := make([]byte, etherHeader, etherHeader+size)
	copy(b, destination[:])
	copy(b[6:], source[:])
	binary.BigEndian.PutUint16(b[12:], kind)
	return b
}

func arp(operation byte, mac [6]byte, addr netip.Addr, to [6]byte, toAddr netip.Addr) []byte {
	b := ether(to, mac, etherARP, 28)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, operation)
	b = append(append(b, mac[:]...), addr.AsSlice()...)
	return append(append(b, to[:]...), toAddr.AsSlice()...)
}

// advertisement overrides what the neighbours knew. It comes from the address itself, which is as good as any of the
// node's, and one that the kernel will not have changed meanwhile.
func advertisement(mac [6]byte, addr, to netip.Addr, toMAC [6]byte, flags byte) []byte {
	const override = 0x20
	m := []byte{advertise, 0, 0, 0, flags | override, 0, 0, 0}
	m = append(m, addr.AsSlice()...)
	m = append(append(m, 2, 1), mac[:]...) // target link-layer address
	b := ether(toMAC, mac, etherIPv6, ip6Header+len(m))
	b = append(b, 0x60, 0, 0, 0, 0, byte(len(m)), icmp6, 255)
	b = append(append(b, addr.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(m[2:], checksum(addr, to, m))
	return append(b, m...)
}

// checksum is that of ICMPv6, over the pseudo-header too (RFC 8200, 8.1).
func checksum(from, to netip.Addr, m []byte) uint16 {
	var sum uint32
	for _, b := range [][]byte{from.AsSlice(), to.AsSlice(), {0, 0, byte(len(m) >> 8), byte(len(m)), 0, 0, 0, icmp6}, m} {
		for i := 0; i+1 < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// multicast is the Ethernet address of an IPv6 group, RFC 2464.
func multicast(group netip.Addr) [6]byte {
	b := group.As16()
	return [6]byte{0x33, 0x33, b[12], b[13], b[14], b[15]}
}

// solicitedNode is the group that questions about an address go to, RFC 4291, 2.7.1.
func solicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	return netip.AddrFrom16([16]byte{0xff, 2, 11: 1, 12: 0xff, 13: b[13], 14: b[14], 15: b[15]})
}
