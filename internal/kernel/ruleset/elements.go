package ruleset

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// elements are those of a table, by the names of their sets.
type elements map[string][]nft.Element

// named is the name of a set or chain that there is once for each family.
func named(set string, f inet.Family) string {
	if f == inet.IPv4 {
		return set + "4"
	}
	return set + "6"
}

// sorted is a list of elements as nft.Table wants it.
func sorted(list []nft.Element) []nft.Element {
	nft.Sort(list)
	return slices.Compact(list)
}

// ofPrefixes are the elements of a set of prefixes of one family.
func ofPrefixes(list []netip.Prefix, f inet.Family) []nft.Element {
	var all []nft.Element
	for _, p := range list {
		if inet.FamilyOf(p.Addr()) == f {
			all = append(all, nft.OfPrefix(p))
		}
	}
	return sorted(all)
}

// ofAddrs are the elements of a set of addresses of one family.
func ofAddrs(list []netip.Addr, f inet.Family) []nft.Element {
	var all []nft.Element
	for _, a := range list {
		if inet.FamilyOf(a) == f {
			all = append(all, nft.OfAddr(a))
		}
	}
	return sorted(all)
}

// prefixes returns what a set of both families holds, without the intervals that are no prefixes: those are not ours.
func (e elements) prefixes(set string) (list []netip.Prefix) {
	for _, f := range inet.Families {
		for _, x := range e[named(set, f)] {
			if p, ok := x.Prefix(); ok {
				list = append(list, p)
			}
		}
	}
	return list
}

// addrs is prefixes of single addresses.
func (e elements) addrs(set string) (list []netip.Addr) {
	for _, p := range e.prefixes(set) {
		list = append(list, p.Addr())
	}
	return list
}

func addrType(f inet.Family) nftables.SetDatatype {
	if f == inet.IPv4 {
		return nftables.TypeIPAddr
	}
	return nftables.TypeIP6Addr
}

// addrSet and prefixSet are sets of one family.
func addrSet(name string, f inet.Family, comment string) *nft.Set {
	return &nft.Set{Name: named(name, f), Comment: comment, Key: addrType(f)}
}

func prefixSet(name string, f inet.Family, comment string) *nft.Set {
	s := addrSet(name, f, comment)
	s.Interval = true
	return s
}
