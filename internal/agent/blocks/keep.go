package blocks

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

// Keep makes the node's blocks what its pods need. What is in the way is a problem and no error. again is when it
// should be called next if nothing else happens, or 0.
func (b *Blocks) Keep(ctx context.Context, store *lease.Store, avoid []netip.Prefix) (problems []string, again time.Duration, err error) {
	done, err := b.decide(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer done()
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	for _, r := range f.RefusedOf(b.node) { // of others' the controller tells
		problems = append(problems, r.String())
	}
	state, err := store.State()
	if err != nil {
		return problems, 0, err
	}
	if len(f.Pools)+len(f.Of(b.node))+len(problems)+len(state.Pools) == 0 {
		clear(b.busy)
		return problems, 0, nil
	}
	if f.NodeUID(b.node) == "" { // its blocks go with it
		_, err := store.SetPools(nil)
		return problems, 0, err
	}
	if err := b.verify(ctx, &f, state); err != nil {
		problems = append(problems, answer.OneLine(err))
	}
	leases, err := store.List()
	if err != nil {
		return problems, 0, err
	}
	problems = append(problems, b.recover(ctx, &f, leases, state)...)
	turn, _ := b.turn(f, state)
	if state, err = store.SetPools(b.certain(f, turn.Give, state)); err != nil {
		return problems, 0, err
	}
	// From here on they are given to no pod, also while the API server is asked about one of them. An answer that is lost
	// may be of a block that is deleted: before it is given out of again it is verified anew.
	back := slices.DeleteFunc(turn.Back, func(x ippool.Block) bool {
		own := f.Of(b.node)
		return usedOf(x, own, state.InUse)+usedOf(x, own, state.Cooling) > 0 // somebody was faster than SetPools
	})
	for _, x := range back {
		delete(b.verified, x.UID)
	}
	var held []ippool.Held
	for _, x := range back {
		if err := b.giveBack(ctx, x); err != nil {
			problems = append(problems, err.Error()) // it is given to nobody, and the next pass tries again
			continue
		}
		b.drop(&f, x)
	}
	for _, n := range turn.Take {
		var refusal *ippool.Refusal
		if err := b.takeFree(ctx, &f, n, avoid, state); errors.As(err, &refusal) {
			continue // there is none to have in reserve; a pod that needs one is told so
		} else if err != nil {
			problems = append(problems, err.Error())
		}
	}
	turn, held = b.turn(f, state)
	for _, h := range held {
		if h.InUse == 0 && !h.Rested {
			again = restFixed
		}
	}
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return problems, again, err
}

// turn asks what to do with the blocks, given who uses them.
func (b *Blocks) turn(f ippool.Facts, state ipam.State) (ippool.Turnover, []ippool.Held) {
	var held []ippool.Held
	now := b.now()
	blocks := f.Of(b.node)
	inUse := len(blocks)
	for _, r := range f.RefusedOf(b.node) {
		if r.IsValid() {
			blocks = append(blocks, r.Block)
		}
	}
	for i, x := range blocks {
		h := ippool.Held{Block: x, InUse: usedOf(x, blocks[:inUse], state.InUse), Cooling: usedOf(x, blocks[:inUse], state.Cooling), Refused: i >= inUse}
		if _, known := b.busy[x.Prefix]; !known || h.InUse+h.Cooling > 0 {
			b.busy[x.Prefix] = now
		}
		wait := rest
		if x.Fixed {
			wait = restFixed
		}
		h.Rested = now.Sub(b.busy[x.Prefix]) >= wait
		held = append(held, h)
	}
	return f.Turn(b.node, held), held
}

// usedOf counts the addresses of a block. Those that are of another block of the node are not of this one, which is refused
// for overlapping it.
func usedOf(x ippool.Block, own []ippool.Block, addrs map[netip.Addr]bool) int {
	n := 0
	for a := range addrs {
		others := func(y ippool.Block) bool { return y.UID != x.UID && y.Contains(a) }
		if x.Contains(a) && !slices.ContainsFunc(own, others) {
			n++
		}
	}
	return n
}

func used(r netip.Prefix, addrs map[netip.Addr]bool) int {
	n := 0
	for a := range addrs {
		if r.Contains(a) {
			n++
		}
	}
	return n
}
