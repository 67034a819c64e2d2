// Package nft makes the kernel hold nftables tables. A Table is a value; a Held is one in the kernel, with what is known of it:
// Set makes it what it should be, Change does so for a part of it without reading, Holds says whether it still is, and Read
// reads it back. All that a call changes becomes true in one transaction: a packet meets the table as it was or as it
// will be. A table that is right is left alone, and one that is not as we make them is replaced.
//
// What changes with the cluster belongs into sets and maps, so that a change is one of elements.
package nft

import (
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is what a table of family inet should be.
type Table struct {
	Name string
	// Variant tells tables of one name apart that have other rules.
	Variant string
	Sets    []*Set
	Chains  []Chain
	// Elements are those that are no part's, by the names of their sets.
	Elements map[string][]Element
}

// Set is a named set, or a map if it has Data.
type Set struct {
	Name, Comment string
	Key           nftables.SetDatatype
	Data          nftables.SetDatatype
	// Interval says that elements reach from Key to KeyEnd.
	Interval bool
	// Timeout says that rules add the elements, for a time. They are nothing that a table should hold.
	Timeout bool
	Size    uint32 // how many rules may add
	// Parts says that each element is of one part, and begins with that part's key.
	Parts bool
}

// Chain is a chain with its rules. One without a hook is for others to jump to.
type Chain struct {
	Name     string
	Kind     nftables.ChainType
	Hook     *nftables.ChainHook
	Priority *nftables.ChainPriority
	Rules    []Rule
}

// Rule is a rule, with a comment that says what it does.
type Rule struct {
	Comment string
	Exprs   []expr.Any
}

// Element is one of a set or map, with bytes as the kernel has them.
type Element struct {
	Key     string
	KeyEnd  string // the last key, of an interval
	Value   string // of a map; the chain of a verdict that goes there
	Verdict bool
	Code    expr.VerdictKind
	Comment string
}

// Add appends a rule.
func (c *Chain) Add(comment string, parts ...[]expr.Any) {
	c.Rules = append(c.Rules, Rule{comment, slices.Concat(parts...)})
}

// Hooked returns a chain of a hook, without rules.
func Hooked(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority) Chain {
	return Chain{Name: name, Kind: kind, Hook: hook, Priority: &priority}
}

// AppendAddr appends an address as the kernel has it.
func AppendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		four := a.As4()
		return append(b, four[:]...)
	}
	sixteen := a.As16()
	return append(b, sixteen[:]...)
}

// AppendPrefix appends the first address of a prefix, and the last.
func AppendPrefix(b []byte, p netip.Prefix) []byte {
	at := len(b)
	b = AppendAddr(b, p.Addr())
	for i, x := range b[at:] {
		b = append(b, x|byte(0xff>>min(max(p.Bits()-i*8, 0), 8)))
	}
	return b
}

// OfPrefix returns the element of a set of prefixes.
func OfPrefix(p netip.Prefix) Element {
	ends := string(AppendPrefix(nil, p))
	return Element{Key: ends[:len(ends)/2], KeyEnd: ends[len(ends)/2:]}
}

// OfAddr returns the element of a set of addresses.
func OfAddr(a netip.Addr) Element { return Element{Key: string(AppendAddr(nil, a))} }

// Prefix is the reverse of OfPrefix, and of OfAddr. It is not ok if the element is no prefix.
func (e Element) Prefix() (netip.Prefix, bool) {
	from, ok := netip.AddrFromSlice([]byte(e.Key))
	if e.KeyEnd == "" {
		return netip.PrefixFrom(from, from.BitLen()), ok
	}
	p := netip.PrefixFrom(from, sameBits(e.Key, e.KeyEnd))
	return p, ok && len(e.Key) == len(e.KeyEnd) && OfPrefix(p.Masked()) == Element{Key: e.Key, KeyEnd: e.KeyEnd}
}

// sameBits returns how many bits two keys of one length begin with in common.
func sameBits(a, b string) int {
	for i := range min(len(a), len(b)) {
		if n := bits.LeadingZeros8(a[i] ^ b[i]); n < 8 {
			return i*8 + n
		}
	}
	return len(a) * 8
}

// Sort sorts elements by their keys, as those of a Table and those that are read are.
func Sort(list []Element) {
	slices.SortFunc(list, func(a, b Element) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		return strings.Compare(a.KeyEnd, b.KeyEnd)
	})
}

func (s *Set) isMap() bool { return s.Data.Name != "" }

func (s *Set) isConcat() bool { return strings.Contains(s.Key.Name, " . ") }

// isPaired says that an interval is two elements to the kernel: the first key, and the first that is behind it.
func (s *Set) isPaired() bool { return s.Interval && !s.isConcat() }

func (s *Set) flags() uint32 {
	var flags uint32
	if s.isMap() {
		flags |= unix.NFT_SET_MAP
	}
	if s.Interval {
		flags |= unix.NFT_SET_INTERVAL
		if s.isConcat() {
			flags |= setConcat
		}
	}
	if s.Timeout {
		flags |= unix.NFT_SET_TIMEOUT | unix.NFT_SET_EVAL
	}
	return flags
}

// dataType returns the type and size of a map's values, as in messages.
func (s *Set) dataType() (kind, size uint32) {
	if s.Data.Name == nftables.TypeVerdict.Name {
		return unix.NFT_DATA_VERDICT, 0
	}
	return s.Data.GetNFTMagic(), s.Data.Bytes
}

// behind returns the key behind the last of an interval, unless that is the last of all.
func behind(last string) (string, bool) {
	b := []byte(last)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return string(b), true
		}
	}
	return "", false
}

// before is the reverse of behind.
func before(key string) string {
	b := []byte(key)
	for i := len(b) - 1; i >= 0; i-- {
		b[i]--
		if b[i] != 0xff {
			break
		}
	}
	return string(b)
}

// bound is an element of an interval as the kernel has it.
type bound struct {
	Element
	end bool
}

// intervals makes elements of what the kernel lists of a set of intervals. It is not ok if one begins within another. nft begins
// such a set with an end.
func intervals(bounds []bound) ([]Element, bool) {
	slices.SortFunc(bounds, func(a, b bound) int {
		if c := strings.Compare(a.Key, b.Key); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	var list []Element
	for i, b := range bounds {
		switch {
		case b.end:
			continue
		case i+1 == len(bounds): // without an end: it reaches to the last of all
			b.KeyEnd = strings.Repeat("\xff", len(b.Key))
		case !bounds[i+1].end:
			return nil, false
		default:
			b.KeyEnd = before(bounds[i+1].Key)
		}
		list = append(list, b.Element)
	}
	return list, true
}
