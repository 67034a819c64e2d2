package blocks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// certain reduces pools to blocks that are verified, or from which addresses were assigned before: a restarted agent
// continues while it cannot ask.
func (b *Blocks) certain(f ippool.Facts, pools []ipam.Pool, state ipam.State) []ipam.Pool {
	ok := map[netip.Prefix]bool{}
	for _, x := range f.Of(b.node) {
		ok[x.Prefix] = b.verified[x.UID]
	}
	for _, p := range state.Pools {
		for _, r := range slices.Concat(p.Ranges, p.Fixed) {
			if _, own := ok[r]; own {
				ok[r] = true
			}
		}
	}
	var certain []ipam.Pool
	for _, p := range pools {
		doubtful := func(r netip.Prefix) bool { return !ok[r] }
		p.Ranges, p.Fixed = slices.DeleteFunc(slices.Clone(p.Ranges), doubtful), slices.DeleteFunc(slices.Clone(p.Fixed), doubtful)
		if len(p.Ranges)+len(p.Fixed) > 0 {
			certain = append(certain, p)
		}
	}
	return certain
}

// verify checks that nothing overlaps the node's blocks. A block that does was created at the same time with another size,
// otherwise the names would have clashed. The node gives up its own block, unless addresses of it were assigned before,
// since then the other node has yet to check.
//
// Two nodes that each create a block and check afterwards cannot both miss the other's, since the second to create one
// checks after that. Both may see the other's; then both give up, and their pods retry.
func (b *Blocks) verify(ctx context.Context, f *ippool.Facts, state ipam.State) error {
	var doubtful []ippool.Block
	for _, x := range f.Of(b.node) {
		if !b.verified[x.UID] {
			doubtful = append(doubtful, x)
		}
	}
	if len(doubtful) == 0 {
		return nil
	}
	objects, err := b.list(ctx)
	if err != nil {
		return err
	}
	all := f.WithBlocks(objects)
	var errs []error
	for _, x := range doubtful {
		overlapping, there, isUsed := overlaps(all, x)
		if isUsed && given(x.Prefix, state) {
			overlapping = netip.Prefix{} // the other one came later, and nobody uses it
		}
		switch {
		case !there: // the watches are late
			// Remembered: the watches must not show it in addition to a block of the same prefix that is created next.
			b.gone[x.UID] = b.now()
			b.drop(f, x)
			errs = append(errs, fmt.Errorf("block %s of this node is gone", x.Prefix))
		case overlapping.IsValid() && given(x.Prefix, state):
			errs = append(errs, fmt.Errorf("block %s of this node overlaps another node's, %s", x.Prefix, overlapping))
		case overlapping.IsValid():
			errs = append(errs, &takenError{x.Prefix}, b.giveBack(ctx, x))
			b.drop(f, x)
		default:
			b.verified[x.UID] = true
			if uid := f.NodeUID(b.node); x.Owner != uid {
				// A recreated Node has another UID, and the garbage collector would delete its blocks.
				errs = append(errs, b.ask(func() error { return b.api.SetBlockOwner(ctx, x.Name, x.UID, kube.NodeOwner(b.node, uid)) }))
			}
		}
	}
	return errors.Join(errs...)
}

// given reports whether addresses of the block are or were assigned.
func given(r netip.Prefix, state ipam.State) bool {
	for _, p := range state.Pools {
		if slices.Contains(p.Ranges, r) || slices.Contains(p.Fixed, r) {
			return true
		}
	}
	return used(r, state.InUse)+used(r, state.Cooling) > 0
}

// overlaps looks for a block among all, and for another one that overlaps it. Blocks that were refused because of an
// overlap count, too: which of two is older depends on the clocks of API servers, of which there may be several, and that
// is not good enough to assign addresses.
func overlaps(all ippool.Facts, own ippool.Block) (other netip.Prefix, there, isUsed bool) {
	isOwn := func(x ippool.Block) bool { return x.UID == own.UID }
	isUsed = slices.ContainsFunc(all.Blocks, isOwn)
	there = isUsed || slices.ContainsFunc(all.Refused, func(r ippool.RefusedBlock) bool { return isOwn(r.Block) })
	for _, p := range all.Taken() {
		if p != own.Prefix && p.Overlaps(own.Prefix) { // of a prefix there is one block
			other = p
		}
	}
	return other, there, isUsed
}
