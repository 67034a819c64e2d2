package podnet

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// without returns prefixes that cover what the first ones do and the others do not.
func without(list, holes []netip.Prefix) []netip.Prefix {
	var left []netip.Prefix
	for _, p := range list {
		i := slices.IndexFunc(holes, p.Overlaps)
		switch {
		case i < 0:
			left = append(left, p)
		case isWithin(p, holes[i]):
		default:
			left = append(left, without(halves(p), holes)...)
		}
	}
	return left
}

// halves returns the two prefixes that a larger one consists of.
func halves(p netip.Prefix) []netip.Prefix {
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	upper, _ := netip.AddrFromSlice(b)
	return []netip.Prefix{netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(upper, p.Bits()+1)}
}

// claim is a range that a node says is its own.
type claim struct {
	prefix netip.Prefix
	owner  *member
}

func compareClaims(a, b claim) int { return a.prefix.Compare(b.prefix) }

// settle leaves each range with one node: the oldest that claims any of it. It looks at nothing but the nodes, so
// that all of them come to the same result.
func (p *planner) settle(members []*member, nodes map[netip.Addr]string) {
	var all []claim
	for _, m := range members {
		for _, f := range inet.Families {
			if own := m.own(f); own.IsValid() {
				m.setTunnel(f, TunnelAddr(own))
			}
		}
		if len(m.podCIDRs) > 1 {
			m.podCIDRs = inet.Disjoint(m.podCIDRs)
		}
	}
	for _, blocks := range []bool{false, true} { // a Node's own range is not lost to a block, however old
		for _, m := range members {
			for _, c := range m.podCIDRs {
				if m.blocks[c] == blocks {
					all = append(all, claim{c, m})
				}
			}
		}
	}
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, compareClaims)
	for i := 1; i < len(sorted); i++ {
		// Prefixes overlap only by lying within each other, so that if any two do, neighbours do.
		if sorted[i-1].prefix.Overlaps(sorted[i].prefix) {
			p.arbitrate(all)
			break
		}
	}

	addrs := slices.SortedFunc(maps.Keys(nodes), netip.Addr.Compare)
	for _, m := range members {
		m.podCIDRs = slices.DeleteFunc(m.podCIDRs, func(c netip.Prefix) bool {
			i, _ := slices.BinarySearchFunc(addrs, c.Addr(), netip.Addr.Compare)
			if i == len(addrs) || !c.Contains(addrs[i]) {
				return false
			}
			p.add(m.name, UnderlayClash, "pod CIDR %s contains %s, the address of node %s: no route is made", c, addrs[i], nodes[addrs[i]])
			return true
		})
		for _, f := range inet.Families {
			within := func(c netip.Prefix) bool { return !m.blocks[c] && c.Contains(m.tunnel(f)) }
			if !slices.ContainsFunc(m.podCIDRs, within) {
				m.setTunnel(f, netip.Addr{})
				if own := m.own(f); own.IsValid() {
					m.setTunnel(f, TunnelAddr(own))
				}
			}
		}
	}
}

// arbitrate takes from each node the ranges that overlap one of an older node. Claims are given in order of precedence:
// the oldest node's first, and blocks behind all others.
func (p *planner) arbitrate(all []claim) {
	var granted []claim // sorted, and none overlaps another
	for _, c := range all {
		at, _ := slices.BinarySearchFunc(granted, c, compareClaims)
		var other *claim
		if at > 0 && granted[at-1].prefix.Overlaps(c.prefix) {
			other = &granted[at-1]
		} else if at < len(granted) && granted[at].prefix.Overlaps(c.prefix) {
			other = &granted[at]
		}
		switch {
		case other == nil:
		case c.owner.blocks[c.prefix]:
			p.add(c.owner.name, Overlap, "block %s overlaps %s of node %s, which keeps it", c.prefix, other.prefix, other.owner.name)
		default:
			p.add(c.owner.name, Overlap, "pod CIDR %s overlaps %s of the older node %s, which keeps it", c.prefix, other.prefix, other.owner.name)
		}
		if other != nil {
			c.owner.podCIDRs = slices.DeleteFunc(c.owner.podCIDRs, func(x netip.Prefix) bool { return x == c.prefix })
			continue
		}
		granted = slices.Insert(granted, at, c)
	}
}

// avoidUnderlay takes ranges away whose routes would hide a segment that this machine is on.
func (p *planner) avoidUnderlay(me *member, members []*member) {
	for _, m := range members {
		m.podCIDRs = slices.DeleteFunc(m.podCIDRs, func(c netip.Prefix) bool {
			for _, i := range p.underlay {
				for _, prefix := range i.Addrs {
					if prefix.IsSingleIP() || !c.Overlaps(prefix) || m == me && isWithin(prefix, c) {
						continue
					}
					p.add(m.name, UnderlayClash, "pod CIDR %s overlaps %s of device %s: no route is made", c, prefix.Masked(), i.Name)
					return true
				}
			}
			return false
		})
	}
	p.leaveOut(me)
}

// leaveOut takes addresses of this node's own ranges away from the underlay. A network that was here before has them
// on its bridge: no node is there, and a route to a single pod wins over the bridge's.
func (p *planner) leaveOut(me *member) {
	underlay := make([]Interface, 0, len(p.underlay))
	for _, i := range p.underlay {
		i.Addrs = slices.DeleteFunc(slices.Clone(i.Addrs), func(prefix netip.Prefix) bool {
			left := !prefix.IsSingleIP() && slices.ContainsFunc(me.podCIDRs, func(c netip.Prefix) bool { return isWithin(prefix, c) })
			if left {
				p.add(me.name, Leftover, "device %s has %s, of this node's own pods: what is left of another network is to be removed (ip link del %s)", i.Name, prefix, i.Name)
			}
			return left
		})
		if len(i.Addrs) > 0 {
			underlay = append(underlay, i)
		}
	}
	p.underlay = underlay
}

func isWithin(inner, outer netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Overlaps(inner)
}
