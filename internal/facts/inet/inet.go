// Package inet has what net/netip lacks: the family of an address, and functions of prefixes.
package inet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
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

// Each holds something for each family.
type Each[T any] struct{ V4, V6 T }

// Of returns what is held for a family.
func (e *Each[T]) Of(f Family) *T {
	if f == IPv4 {
		return &e.V4
	}
	return &e.V6
}

// ParseAddr reads an address as the API has always done: zeros before a number mean nothing, and IPv4 may be written
// within IPv6. New objects are refused such addresses, old ones keep them.
func ParseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		parts := strings.Split(s, ".")
		for i, p := range parts {
			n, err := strconv.ParseUint(p, 10, 8)
			if err != nil {
				return a, errors.New("is no address")
			}
			parts[i] = strconv.Itoa(int(n))
		}
		if a, err = netip.ParseAddr(strings.Join(parts, ".")); err != nil {
			return a, errors.New("is no address")
		}
	}
	if a.Zone() != "" {
		return a, errors.New("is of one link alone")
	}
	return a.Unmap(), nil
}

// ParsePrefix reads a range of addresses in CIDR notation as the API has always done, that is as ParseAddr reads an address, and
// without host bits.
func ParsePrefix(s string) (netip.Prefix, error) {
	addr, length, _ := strings.Cut(s, "/")
	a, err := ParseAddr(addr)
	bits, bitsErr := strconv.Atoi(length)
	if err != nil || bitsErr != nil {
		return netip.Prefix{}, errors.New("is no range of addresses")
	}
	if strings.Contains(addr, ":") && a.Is4() { // IPv4 within IPv6
		bits -= 96
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{}, errors.New("is no range of addresses")
	}
	return p, nil
}

// Contains says whether an address is in one of some prefixes.
func Contains(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
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

// Prefixes returns the prefixes that have the addresses from first to last, in order, and no others.
func Prefixes(first, last netip.Addr) (list []netip.Prefix) {
	for first.IsValid() && !last.Less(first) {
		p := netip.PrefixFrom(first, first.BitLen())
		for p.Bits() > 0 { // the longest range that begins here and ends in time
			wider, _ := first.Prefix(p.Bits() - 1)
			if wider.Addr() != first || last.Less(Last(wider)) {
				break
			}
			p = wider
		}
		list = append(list, p)
		first = Last(p).Next()
	}
	return list
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
