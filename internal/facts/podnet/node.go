package podnet

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// ParseNode reads a node's addresses and ranges as the API has them: strings. What cannot be read is left out and
// reported.
func ParseNode(name string, created time.Time, addrs, podCIDRs []string) (Node, []Problem) {
	n := Node{Name: name, Created: created}
	var problems []Problem
	for _, s := range addrs {
		a, err := netip.ParseAddr(s)
		if err != nil {
			problems = append(problems, Problem{name, InvalidAddr, fmt.Sprintf("address %q is none", s)})
			continue
		}
		n.Addrs = append(n.Addrs, a)
	}
	for _, s := range podCIDRs {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			problems = append(problems, Problem{name, InvalidPodCIDR, fmt.Sprintf("pod CIDR %q is none; want something like 10.244.1.0/24", s)})
			continue
		}
		n.PodCIDRs = append(n.PodCIDRs, p)
	}
	return n, problems
}

// addrProblem says why an address cannot be a node's, or nothing.
func addrProblem(a netip.Addr) string {
	switch {
	case !a.IsValid():
		return "it is empty"
	case a.Is4In6():
		return "it is IPv4 written as IPv6"
	case a.Zone() != "":
		return "it has a zone"
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast():
		return "it means something else on each machine"
	}
	return ""
}

// podCIDRProblem says why a prefix cannot be a node's pod CIDR, or nothing.
func podCIDRProblem(p netip.Prefix) string {
	if why := rangeProblem(p); why != "" || !p.IsSingleIP() {
		return why
	}
	return "it has room for no pod beside the node's tunnel address"
}

// rangeProblem says why a prefix cannot be a range of pods, or nothing.
func rangeProblem(p netip.Prefix) string {
	switch {
	case !p.IsValid():
		return "it is empty"
	case p.Addr().Is4In6():
		return "it is IPv4 written as IPv6"
	case p != p.Masked():
		return "it has host bits; want " + p.Masked().String()
	}
	for _, r := range reserved {
		if p.Overlaps(r) {
			return "it overlaps " + r.String() + ", which is no one's to route"
		}
	}
	return ""
}

// Ranges in which no pod can be. They hold the default route, so that no node's typing error redirects everything.
var reserved = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/8"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string {
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// TunnelMAC is the address of a node's vxlan device. It follows from the node's name, so that all that a node has
// to be told of another is in the other's Node object: no annotation, and no second object to wait for.
func TunnelMAC(node string, vni uint32) MAC {
	sum := sha256.Sum256(binary.BigEndian.AppendUint32([]byte(node+"\x00"), vni))
	m := MAC(sum[:6])
	m[0] = m[0]&^0x01 | 0x02 // unicast, and of no manufacturer
	return m
}

// TunnelAddr is the address of a node's vxlan device in the first pod CIDR of a family: .1 or ::1. IPAM gives it
// to no pod.
func TunnelAddr(podCIDR netip.Prefix) netip.Addr { return podCIDR.Masked().Addr().Next() }

// linkLocal is the link-local IPv6 address that goes with a MAC address (RFC 4291, appendix A).
func linkLocal(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 0x02, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}
