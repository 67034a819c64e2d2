// Package inet has what net/netip lacks: the family of an address, and functions of prefixes.
package inet

import (
	"fmt"
	"net/netip"
	"slices"
)

// Family is an IP family. Its zero value is neither.
type Family int

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both, in the order in which addresses are told.
var Families = []Family{IPv4, IPv6}

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

func (f Family) String() string {
	switch f {
	case IPv4:
		return "IPv4"
	case IPv6:
		return "IPv6"
	}
	return fmt.Sprintf("IPv%d", int(f))
}

// Last returns the last address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Disjoint returns prefixes masked and sorted, without those that lie within others.
func Disjoint(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	for i, p := range list {
		list[i] = p.Masked()
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	kept := list[:0]
	for _, p := range list {
		if len(kept) == 0 || !kept[len(kept)-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}
