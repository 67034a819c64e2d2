package ruleset

import (
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// elements are the elements of a table, by set name.
type elements map[string][]nft.Element

// named returns the name of a set or chain that exists once for each family.
func named(set string, f inet.Family) string {
	if f == inet.IPv4 {
		return set + "4"
	}
	return set + "6"
}

// sorted sorts a list of elements as nft.Table requires it. Most lists are sorted already.
func sorted(list []nft.Element) []nft.Element {
	for i := range list[min(1, len(list)):] {
		if list[i].Key >= list[i+1].Key {
			nft.Sort(list)
			return slices.Compact(list)
		}
	}
	return list
}

// ofPrefixes returns the elements of a set of prefixes of one family. All keys share one string, since lists have thousands.
func ofPrefixes(list []netip.Prefix, f inet.Family) []nft.Element {
	n := words(f) * 4
	b := make([]byte, 0, 2*n*len(list))
	for _, p := range list {
		if inet.FamilyOf(p.Addr()) == f {
			b = nft.AppendPrefix(b, p)
		}
	}
	all := make([]nft.Element, 0, len(b)/n/2)
	for s := string(b); s != ""; s = s[2*n:] {
		all = append(all, nft.Element{Key: s[:n], KeyEnd: s[n : 2*n]})
	}
	return sorted(all)
}

// ofAddrs returns the elements of a set of addresses of one family.
func ofAddrs(list []netip.Addr, f inet.Family) []nft.Element {
	n := words(f) * 4
	b := make([]byte, 0, n*len(list))
	for _, a := range list {
		if inet.FamilyOf(a) == f {
			b = nft.AppendAddr(b, a)
		}
	}
	all := make([]nft.Element, 0, len(b)/n)
	for s := string(b); s != ""; s = s[n:] {
		all = append(all, nft.Element{Key: s[:n]})
	}
	return sorted(all)
}

func allPrefixes(list []nft.Element) bool {
	return !slices.ContainsFunc(list, func(e nft.Element) bool { _, ok := e.Prefix(); return !ok })
}

// prefixes returns the prefixes of a set, IPv4 before IPv6.
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

// addrs returns the addresses of a set, IPv4 before IPv6.
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

// addrSet and prefixSet return sets of one family.
func addrSet(name string, f inet.Family, comment string) *nft.Set {
	return &nft.Set{Name: named(name, f), Comment: comment, Key: addrType(f)}
}

func prefixSet(name string, f inet.Family, comment string) *nft.Set {
	s := addrSet(name, f, comment)
	s.Interval = true
	return s
}
