package ipam

import (
	"math"
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Of returns the pool's ranges of a family.
func (p Pool) Of(f inet.Family) []netip.Prefix {
	var ranges []netip.Prefix
	for _, r := range p.Ranges {
		if inet.FamilyOf(r.Addr()) == f {
			ranges = append(ranges, r)
		}
	}
	return ranges
}

// whole says that a range is too small to keep addresses back: beyond /30 and /126 every address is for pods.
func whole(r netip.Prefix) bool { return r.Addr().BitLen()-r.Bits() < 2 }

// FirstHost returns the address of the range that is the node's own, such as its tunnel's. Ranges of one or two
// addresses have none to spare.
func FirstHost(r netip.Prefix) (netip.Addr, bool) {
	if !r.IsValid() || whole(r) {
		return netip.Addr{}, false
	}
	return r.Masked().Addr().Next(), true
}

// Reserved says that an address of the range is not for pods: the network's own address (in IPv6 the
// subnet-router anycast address, RFC 4291 2.6.1), the first host, which is the node, and IPv4's broadcast.
func Reserved(r netip.Prefix, a netip.Addr) bool {
	if whole(r) {
		return false
	}
	network := r.Masked().Addr()
	if a == network || a == network.Next() {
		return true
	}
	return a.Is4() && !r.Contains(a.Next())
}

// Size is the number of addresses of the range that pods can have; the largest number there is if it is more.
func Size(r netip.Prefix) uint64 {
	host := r.Addr().BitLen() - r.Bits()
	switch {
	case host >= 64:
		return math.MaxUint64
	case host < 2:
		return 1 << host
	case r.Addr().Is4():
		return 1<<host - 3
	default:
		return 1<<host - 2
	}
}

// Count is the number of all addresses of the range; the largest number there is if it is more.
func Count(r netip.Prefix) uint64 {
	if host := r.Addr().BitLen() - r.Bits(); host < 64 {
		return 1 << host
	}
	return math.MaxUint64
}

func (p Pool) size(r netip.Prefix) uint64 {
	if p.Whole {
		return Count(r)
	}
	return Size(r)
}

// Usage says how full a pool is in one family.
type Usage struct {
	Pool    string      `json:"pool"`
	Family  inet.Family `json:"family"`
	Size    uint64      `json:"size"` // addresses that pods can have
	InUse   uint64      `json:"inUse"`
	Cooling uint64      `json:"cooling"`
}

// Usage counts.
func (p Pool) Usage(f inet.Family, s State) Usage {
	u := Usage{Pool: p.Name, Family: f}
	for _, r := range p.Of(f) {
		if u.Size += p.size(r); u.Size < p.size(r) {
			u.Size = math.MaxUint64
		}
		for a := range s.InUse {
			if r.Contains(a) {
				u.InUse++
			}
		}
		for a := range s.Cooling {
			if r.Contains(a) && !s.InUse[a] {
				u.Cooling++
			}
		}
	}
	return u
}
