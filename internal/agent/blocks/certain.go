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

// certain leaves of pools what is verified, or was given from before: an agent that was started anew goes on while
// it cannot ask.
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

// verify makes certain that nothing overlaps the node's blocks. A block that does was made at the same time as ours
// and has another size, or names would have clashed: ours goes, unless it has been given from before, since then
// the other has yet to look.
//
// Two nodes that each make a block and look afterwards cannot both overlook the other's, since the second to make
// one looks after that. Both may see the other's; then both go, and their pods try again.
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
			// Remembered: a block of the same prefix that is made next must not stand beside it in what they say.
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
				// A Node that was made anew has another UID, and the garbage collector would take its blocks away.
				errs = append(errs, b.ask(func() error { return b.api.SetBlockOwner(ctx, x.Name, x.UID, kube.NodeOwner(b.node, uid)) }))
			}
		}
	}
	return errors.Join(errs...)
}

// given says whether addresses of the block are given out, or were.
func given(r netip.Prefix, state ipam.State) bool {
	for _, p := range state.Pools {
		if slices.Contains(p.Ranges, r) || slices.Contains(p.Fixed, r) {
			return true
		}
	}
	return used(r, state.InUse)+used(r, state.Cooling) > 0
}

// overlaps looks for a block among all, and for another one that overlaps it. Those count that are refused, too, if they
// were made for that reason: which of two was there first is by the clocks of API servers, of which there may be several,
// and is not good enough to give addresses by.
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
