package topology

import (
	"encoding/binary"
	"errors"
	"net/netip"
)

// Addresses follow one scheme, so that a learner can tell from an address what it is. The underlay
// x.y.0.0/16 has the core subnet x.y.0.0/24, and x.y.1.0/24, x.y.2.0/24 … for the clusters in their order.
//
//	x.y.0.1          the host's end of the uplink
//	x.y.0.2          the core switch's end of the uplink
//	x.y.0.10+k       the API balancer of cluster k, when it has several control-plane nodes
//	x.y.k+1.1        the gateway of cluster k
//	x.y.k+1.2+i      node i of cluster k
//
// An IPv6 underlay is divided in the same way with a /64 for each subnet.
const (
	uplinkHost    = 1
	uplinkCore    = 2
	firstBalancer = 10
	gateway       = 1
	firstNode     = 2

	subnetBits4 = 24
	subnetBits6 = 64
)

// subnet returns block number n of the given length in p.
func subnet(p netip.Prefix, bits, n int) netip.Prefix {
	return netip.PrefixFrom(add(p.Masked().Addr(), n, p.Addr().BitLen()-bits), bits)
}

// host returns address number n of p.
func host(p netip.Prefix, n int) netip.Addr { return add(p.Masked().Addr(), n, 0) }

// add returns a + n<<shift.
func add(a netip.Addr, n, shift int) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n)<<shift)
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	hi, lo := binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])
	if shift >= 64 {
		hi += uint64(n) << (shift - 64)
	} else {
		sum := lo + uint64(n)<<shift
		if sum < lo {
			hi++
		}
		lo = sum
		hi += uint64(n) >> (64 - shift) // a shift by 64 gives 0
	}
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	return netip.AddrFrom16(b)
}

// lan returns subnet n of the underlay of a family: 0 is the core, k+1 is cluster k. It is the zero
// prefix as long as the lab has no underlay of that family.
func (l *Lab) lan(f Family, n int) netip.Prefix {
	if f == IPv4 && l.Underlay4.IsValid() {
		return subnet(l.Underlay4, subnetBits4, n)
	}
	if f == IPv6 && l.Underlay6.IsValid() {
		return subnet(l.Underlay6, subnetBits6, n)
	}
	return netip.Prefix{}
}

// Subnets returns the subnet that the cluster's nodes share, one for each of its families.
func (c *Cluster) Subnets(l *Lab) []netip.Prefix {
	var subnets []netip.Prefix
	for _, f := range c.Families {
		if lan := l.lan(f, c.Index+1); lan.IsValid() {
			subnets = append(subnets, lan)
		}
	}
	return subnets
}

// Gateways returns the address that the cluster's nodes route through, one for each of its families.
func (c *Cluster) Gateways(l *Lab) []netip.Addr {
	var addrs []netip.Addr
	for _, lan := range c.Subnets(l) {
		addrs = append(addrs, host(lan, gateway))
	}
	return addrs
}

// NodeAddrs returns the node's own addresses, one for each family of its cluster, the primary first.
func (l *Lab) NodeAddrs(c *Cluster, n *Node) []netip.Addr {
	var addrs []netip.Addr
	for _, lan := range c.Subnets(l) {
		addrs = append(addrs, host(lan, firstNode+n.Index))
	}
	return addrs
}

// UplinkHost returns the host's addresses on the uplink, each with the length of the core subnet.
func (l *Lab) UplinkHost() []netip.Prefix { return l.uplink(uplinkHost) }

// UplinkCore returns the core switch's addresses on the uplink, each with the length of the core subnet.
func (l *Lab) UplinkCore() []netip.Prefix { return l.uplink(uplinkCore) }

func (l *Lab) uplink(n int) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, lan := range l.CoreSubnets() {
		prefixes = append(prefixes, netip.PrefixFrom(host(lan, n), lan.Bits()))
	}
	return prefixes
}

// CoreSubnets returns the subnets of the core switch, IPv4 first.
func (l *Lab) CoreSubnets() []netip.Prefix {
	var subnets []netip.Prefix
	for _, f := range []Family{IPv4, IPv6} {
		if lan := l.lan(f, 0); lan.IsValid() {
			subnets = append(subnets, lan)
		}
	}
	return subnets
}

// APIAddr returns where the cluster's API server is reached: the only control-plane node, or the balancer
// in front of several. It is the zero address as long as the lab has no underlay.
func (l *Lab) APIAddr(c *Cluster) netip.Addr {
	if planes := c.ControlPlanes(); len(planes) == 1 {
		if addrs := l.NodeAddrs(c, &planes[0]); len(addrs) > 0 {
			return addrs[0]
		}
		return netip.Addr{}
	}
	if len(c.Families) == 0 {
		return netip.Addr{}
	}
	core := l.lan(c.Families[0], 0)
	if !core.IsValid() {
		return netip.Addr{}
	}
	return host(core, firstBalancer+c.Index)
}

// Prefixes returns every range that the lab's clusters use inside, which the underlay has to avoid.
func (l *Lab) Prefixes() []netip.Prefix {
	var prefixes []netip.Prefix
	for i := range l.Clusters {
		prefixes = append(prefixes, l.Clusters[i].PodCIDRs...)
		prefixes = append(prefixes, l.Clusters[i].ServiceCIDRs...)
	}
	return prefixes
}

// ChooseUnderlay returns the first underlay that overlaps nothing of taken: 10.201.0.0/16 with
// fd00:fa:201::/48, then 10.202.0.0/16 with fd00:fa:202::/48, up to 250. The number is the same in both
// families so that addresses of one node look alike.
func ChooseUnderlay(taken []netip.Prefix) (v4, v6 netip.Prefix, err error) {
	free := func(p netip.Prefix) bool {
		for _, t := range taken {
			if t.IsValid() && t.Bits() > 0 && p.Overlaps(t) {
				return false
			}
		}
		return true
	}
	for n := 201; n <= 250; n++ {
		v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(n)}), 16)
		// The decimal digits of n, read as hexadecimal.
		digits := uint16(n/100)<<8 | uint16(n/10%10)<<4 | uint16(n%10)
		v6 = netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 0xfa, byte(digits >> 8), byte(digits)}), 48)
		if free(v4) && free(v6) {
			return v4, v6, nil
		}
	}
	return netip.Prefix{}, netip.Prefix{}, errors.New(
		"choose the nodes' addresses: this host uses part of every 10.201.0.0/16 to 10.250.0.0/16; " +
			"name a free /16 as underlay.ipv4 and a free /48 as underlay.ipv6 in the lab file")
}
