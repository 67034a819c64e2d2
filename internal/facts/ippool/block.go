package ippool

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// BlockName is the name of the IPBlock of a prefix: the API server lets one node have it, whatever pool the node
// believes it to be of.
func BlockName(p netip.Prefix) string {
	a := p.Masked().Addr()
	if a.Is4() {
		return fmt.Sprintf("%s-%d", a, p.Bits())
	}
	// Written in full, since a name can neither hold colons nor, in each of its ends, a hyphen.
	var words []string
	b := a.As16()
	for i := 0; i < len(b); i += 2 {
		words = append(words, fmt.Sprintf("%x", binary.BigEndian.Uint16(b[i:])))
	}
	return fmt.Sprintf("%s-%d", strings.Join(words, "-"), p.Bits())
}

// FreeBlock returns a block of the range that overlaps nothing that is taken. Each node begins its search at a
// place of its own, so that nodes that look at the same time seldom find the same block, and finds one that it gave
// back again. It looks at no more blocks than are taken, and one.
func FreeBlock(r Range, taken []netip.Prefix, node string) (netip.Prefix, bool) {
	taken = inet.Disjoint(slices.DeleteFunc(slices.Clone(taken), func(p netip.Prefix) bool { return !p.Overlaps(r.Prefix) }))
	first := netip.PrefixFrom(startAt(r, node), r.BlockBits)
	for _, part := range []struct {
		from netip.Addr
		stop netip.Addr // not looked at any more, if it is valid
	}{{first.Addr(), netip.Addr{}}, {r.Addr(), first.Addr()}} {
		for a := part.from; a.IsValid() && r.Contains(a) && (!part.stop.IsValid() || a.Less(part.stop)); {
			block := netip.PrefixFrom(a, r.BlockBits)
			i, found := slices.BinarySearchFunc(taken, block.Addr(), func(p netip.Prefix, a netip.Addr) int { return p.Addr().Compare(a) })
			var in netip.Prefix
			switch {
			case found || i < len(taken) && block.Contains(taken[i].Addr()):
				in = taken[i]
			case i > 0 && taken[i-1].Contains(a):
				in = taken[i-1]
			default:
				return block, true
			}
			if in.Bits() > block.Bits() {
				in = block
			}
			a = inet.Last(in).Next()
		}
	}
	return netip.Prefix{}, false
}

// startAt is the first address of the block at which a node's search begins.
func startAt(r Range, node string) netip.Addr {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %s", node, r)
	n := h.Sum64()
	b := r.Addr().AsSlice()
	for i := r.BlockBits - 1; i >= r.Bits(); i-- { // the bits that number the block
		if n&1 == 1 {
			b[i/8] |= 0x80 >> (i % 8)
		}
		n = bits.RotateLeft64(n, -1)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Prefixes returns those of blocks.
func Prefixes(blocks []Block) []netip.Prefix {
	var list []netip.Prefix
	for _, b := range blocks {
		list = append(list, b.Prefix)
	}
	return list
}

// Held is a block of a node, and who uses it.
type Held struct {
	Block
	InUse, Cooling int
	// Rested says that nothing of it was in use or cooling down for a while.
	Rested bool
	// Refused is a block that no node uses: there is no way to its addresses.
	Refused bool
}

func (h Held) free() uint64 { return ipam.Count(h.Prefix) - uint64(h.InUse+h.Cooling) }

// Need is a block that a node should take.
type Need struct {
	Pool string
	Range
}

// Turnover is what a node should do with its blocks.
type Turnover struct {
	Give []ipam.Pool // what pods can get addresses from
	Back []Block     // what is to be given back
	Take []Need
}

// Turn decides what a node does with its blocks. It takes another one of a pool when a quarter of a block is all
// that is free, and gives an empty one back when half a block stays free without it, or when nobody on the node
// uses the pool. So one pod that comes and goes moves no block.
func (f Facts) Turn(node string, held []Held) Turnover {
	var t Turnover
	for _, p := range f.Pools {
		usable := f.Usable(p, node) == ""
		give := ipam.Pool{Name: p.Name, ExplicitOnly: true, Whole: true}
		for _, r := range p.Ranges {
			var ordinary []Held
			inUse := 0
			for _, h := range held {
				switch {
				case h.Refused || h.Pool != p.Name || inet.FamilyOf(h.Addr()) != r.Family():
				case !usable || !r.Overlaps(h.Prefix) || h.Bits() < r.Bits() || h.Fixed:
					if h.InUse+h.Cooling == 0 && (h.Rested || !usable) {
						t.Back = append(t.Back, h.Block)
					} else if usable && h.Fixed && r.Contains(h.Addr()) {
						give.Fixed = append(give.Fixed, h.Prefix)
					}
				default:
					ordinary = append(ordinary, h)
					inUse += h.InUse + h.Cooling
				}
			}
			free := uint64(0)
			for _, h := range ordinary {
				free = add(free, h.free())
			}
			block := ipam.Count(netip.PrefixFrom(r.Addr(), r.BlockBits))
			for _, h := range ordinary {
				if h.InUse+h.Cooling == 0 && h.Rested && (inUse == 0 || free-h.free() >= max(block/2, 1)) {
					t.Back = append(t.Back, h.Block)
					free -= h.free()
					continue
				}
				give.Ranges = append(give.Ranges, h.Prefix)
			}
			if inUse > 0 && free < max(block/4, 1) {
				t.Take = append(t.Take, Need{p.Name, r})
			}
		}
		if len(give.Ranges)+len(give.Fixed) > 0 {
			t.Give = append(t.Give, give)
		}
	}
	for _, h := range held {
		p, found := f.Pool(h.Pool)
		if found {
			_, found = p.Range(inet.FamilyOf(h.Addr()))
		}
		if (h.Refused || !found) && h.InUse+h.Cooling == 0 {
			t.Back = append(t.Back, h.Block)
		}
	}
	return t
}

// add adds, and stops at the largest number.
func add(a, b uint64) uint64 {
	if a+b < a {
		return math.MaxUint64
	}
	return a + b
}
