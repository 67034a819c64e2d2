package ippool

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// RefusedBlock is an IPBlock that no node uses: there is no route to it, its addresses are not taken for pods', and its
// node gives none of them out. An agent's token is enough to write any IPBlock, so what a block says is believed only as
// far as an IPPool, which administrators write, bears it out.
type RefusedBlock struct {
	Block         // without a Prefix if its CIDR cannot be read
	Reason string // in one word
	Text   string
}

// The reasons, besides those of pools.
const (
	UnknownPool = "UnknownPool" // there is no IPPool of the name
	NotOfPool   = "NotOfPool"   // the pool does not have the addresses, or its range is not usable
	WrongSize   = "WrongSize"   // neither a block of the pool nor a single fixed address
)

func (r RefusedBlock) String() string {
	return fmt.Sprintf("IPBlock %s of pool %q on node %s is not used: %s", r.Name, r.Pool, r.Node, r.Text)
}

// WithBlocks returns the facts of the same pools, nodes and Services with other blocks. All agents come to the same result
// from the same objects:
//
//   - A block is of a pool that is there, within its range, and of its block size; a fixed one is a single address.
//   - A pool without a Problem overlaps nothing, so neither does a block of it. A pool may come to have a Problem while
//     pods have its addresses: a node joins, a ServiceCIDR is added. To refuse all its blocks would cut those pods off.
//     No node takes another block of such a pool, and of those that there are, each is refused that overlaps a node's
//     range or address, an AddressPool, or a ServiceCIDR that is not younger than the block.
//   - Of blocks that overlap, the oldest stays, by the time at which the API server stored it.
func (f Facts) WithBlocks(objects []*v1alpha1.IPBlock) Facts {
	f.Blocks, f.Refused = nil, nil
	pools := make(map[string]Pool, len(f.Pools))
	for _, p := range f.Pools {
		pools[p.Name] = p
	}
	for _, o := range objects {
		b, reason, text := ReadBlock(o)
		if reason == "" {
			p, found := pools[b.Pool]
			reason, text = f.refuse(b, p, found)
		}
		if reason != "" {
			f.Refused = append(f.Refused, RefusedBlock{b, reason, text})
			continue
		}
		f.Blocks = append(f.Blocks, b)
	}
	slices.SortFunc(f.Blocks, compareBlocks)
	for i := 1; i < len(f.Blocks); i++ {
		// Prefixes overlap only by lying within each other, so that if any two do, neighbours do.
		if f.Blocks[i-1].Overlaps(f.Blocks[i].Prefix) {
			f.arbitrate()
			break
		}
	}
	slices.SortFunc(f.Refused, func(a, b RefusedBlock) int { return compareBlocks(a.Block, b.Block) })
	return f
}

func compareBlocks(a, b Block) int {
	return cmp.Or(a.Compare(b.Prefix), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
}

// ReadBlock reads a block by itself. One that cannot be read has no Prefix, and a reason.
func ReadBlock(o *v1alpha1.IPBlock) (b Block, reason, text string) {
	b = Block{Name: o.Name, UID: o.UID, Pool: o.Spec.Pool, Node: o.Spec.Node, Fixed: o.Spec.Fixed, Created: o.CreationTimestamp.Time}
	for _, r := range o.OwnerReferences {
		if r.Kind == "Node" {
			b.Owner = r.UID
		}
	}
	p, err := netip.ParsePrefix(o.Spec.CIDR)
	if err != nil || p != p.Masked() || b.Name != BlockName(p) {
		return b, InvalidField, fmt.Sprintf("it has the CIDR %.50q, which is not that of its name", o.Spec.CIDR)
	}
	b.Prefix = p
	return b, "", ""
}

// refuse says why a block is not used, but for other blocks, or nothing. p is its pool, if it is found.
func (f *Facts) refuse(b Block, p Pool, found bool) (reason, text string) {
	if !found {
		return UnknownPool, "there is no such IPPool"
	}
	if p.Problem != nil && (p.Problem.Reason == ReservedName || p.Problem.Reason == NoSuchFamily) {
		return p.Problem.Reason, p.Problem.String()
	}
	r, found := p.Range(inet.FamilyOf(b.Addr()))
	switch {
	case !found && p.Problem != nil:
		return NotOfPool, p.Problem.String()
	case !found:
		return NotOfPool, fmt.Sprintf("the pool has no %s", inet.FamilyOf(b.Addr()))
	case b.Bits() < r.Bits() || !r.Contains(b.Addr()):
		return NotOfPool, fmt.Sprintf("it is not within %s, which the pool has", r)
	case b.Fixed && !b.IsSingleIP():
		return WrongSize, "it is said to be a fixed address, and is several"
	case !b.Fixed && b.Bits() != r.BlockBits:
		return WrongSize, fmt.Sprintf("blocks of the pool are of /%d", r.BlockBits)
	case p.Problem == nil:
		return "", "" // what the pool does not overlap, no part of it does
	}
	since := b.Created
	if p.Created().After(since) {
		since = p.Created() // before that nobody had a reason to make it
	}
	return f.foreign(p, b.Prefix, older(f.services, since))
}

// arbitrate leaves of blocks that overlap the oldest.
func (f *Facts) arbitrate() {
	byAge := slices.SortedFunc(slices.Values(f.Blocks), func(a, b Block) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Bits(), b.Bits()), compareBlocks(a, b))
	})
	f.Blocks = f.Blocks[:0]
	for _, b := range byAge {
		at, _ := slices.BinarySearchFunc(f.Blocks, b, compareBlocks)
		var older *Block
		switch {
		case at > 0 && f.Blocks[at-1].Overlaps(b.Prefix):
			older = &f.Blocks[at-1]
		case at < len(f.Blocks) && f.Blocks[at].Overlaps(b.Prefix):
			older = &f.Blocks[at]
		}
		if older != nil {
			f.Refused = append(f.Refused, RefusedBlock{b, Overlap, fmt.Sprintf("it overlaps %s of node %s, which was there first", older.Prefix, older.Node)})
			continue
		}
		f.Blocks = slices.Insert(f.Blocks, at, b)
	}
}

// RefusedOf returns the blocks of a node that nobody uses.
func (f Facts) RefusedOf(node string) []RefusedBlock {
	return slices.DeleteFunc(slices.Clone(f.Refused), func(r RefusedBlock) bool { return r.Node != node })
}

// Taken are the prefixes in which no block may be taken: those in use, and of the others those that lie within a pool.
// These may be left of an earlier pool of other sizes whose pods are still there. One that reaches beyond its pool cannot
// be, and does not keep anybody from the pool.
func (f Facts) Taken() []netip.Prefix {
	taken := Prefixes(f.Blocks)
	for _, r := range f.Refused {
		if r.IsValid() && f.within(r.Prefix) {
			taken = append(taken, r.Prefix)
		}
	}
	return taken
}

func (f Facts) within(p netip.Prefix) bool {
	return slices.ContainsFunc(f.Pools, func(pool Pool) bool {
		return slices.ContainsFunc(pool.Ranges, func(r Range) bool { return r.Bits() <= p.Bits() && r.Contains(p.Addr()) })
	})
}

// Finalizer keeps an IPPool that is deleted for as long as blocks of it are left, so that pods which have their addresses go
// on to be reached: `kubectl delete` waits for them. The controller sets and removes it.
const Finalizer = netconf.AnnotationPrefix + "blocks"

// Finalizers are those that a pool should have, and whether that is another list than it has. The API server lets none be
// added to a pool that is being deleted.
func (f Facts) Finalizers(p Pool) (want []string, differs bool) {
	has := slices.Contains(p.object.Finalizers, Finalizer)
	switch left := f.Left(p); {
	case left && !has && !p.Deleting:
		return append(slices.Clone(p.object.Finalizers), Finalizer), true
	case !left && has:
		return WithoutFinalizer(p.object.Finalizers), true
	}
	return p.object.Finalizers, false
}

// WithoutFinalizer returns a pool's finalizers without ours.
func WithoutFinalizer(list []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(x string) bool { return x == Finalizer })
}

// Left says whether blocks of a pool are left, for which it is kept: those of its ranges, whether they are used or not.
func (f Facts) Left(p Pool) bool {
	of := func(b Block) bool {
		return b.Pool == p.Name && slices.ContainsFunc(p.Ranges, func(r Range) bool { return b.Bits() >= r.Bits() && r.Contains(b.Addr()) })
	}
	return slices.ContainsFunc(f.Blocks, of) ||
		slices.ContainsFunc(f.Refused, func(r RefusedBlock) bool { return r.IsValid() && of(r.Block) })
}

// older returns the ranges that were there at a time. Timestamps of the API have seconds: those of the same one count.
func older(services []serviceRange, since time.Time) []serviceRange {
	return slices.DeleteFunc(slices.Clone(services), func(s serviceRange) bool { return s.created.After(since) })
}
