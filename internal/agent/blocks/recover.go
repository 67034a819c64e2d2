package blocks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

// recover takes again the blocks that the node has lost and whose addresses its pods have: the blocks or the Node were
// deleted. If another node has them now, the pods have to be deleted.
func (b *Blocks) recover(ctx context.Context, f *ippool.Facts, leases []lease.Lease, state ipam.State) (problems []string) {
	asked := false
	for _, l := range leases {
		if l.Pool == netconf.DefaultPool {
			continue
		}
		for _, a := range l.Addresses {
			mine := func(x ippool.Block) bool { return x.Node == b.node && x.Contains(a) }
			if slices.ContainsFunc(f.Blocks, mine) {
				continue
			}
			if !asked { // the watches of an agent that has just started may be older than what it did before
				objects, err := b.list(ctx)
				if err != nil {
					return []string{err.Error()}
				}
				*f, asked = f.WithBlocks(objects), true
				if slices.ContainsFunc(f.Blocks, mine) {
					continue
				}
			}
			if i := slices.IndexFunc(f.Refused, func(r ippool.RefusedBlock) bool { return r.IsValid() && mine(r.Block) }); i >= 0 {
				problems = append(problems, fmt.Sprintf("pod %s/%s has %s, and cannot be reached: %s; delete the pod", l.PodNamespace, l.PodName, a, f.Refused[i]))
				continue
			}
			if err := b.recoverAddress(ctx, f, l.Pool, a, state); err != nil {
				problems = append(problems, fmt.Sprintf("pod %s/%s has %s of pool %q, which is in no block of this node (%v): delete the pod",
					l.PodNamespace, l.PodName, a, l.Pool, err))
			}
		}
	}
	return problems
}

func (b *Blocks) recoverAddress(ctx context.Context, f *ippool.Facts, pool string, a netip.Addr, state ipam.State) error {
	p, found := f.Pool(pool)
	if !found {
		return errors.New("there is no such pool")
	}
	r, found := p.Range(inet.FamilyOf(a))
	if !found || !r.Contains(a) {
		return errors.New("it is not of that pool")
	}
	var err error
	for _, fixed := range []bool{false, true} {
		bits := r.BlockBits
		if fixed {
			bits = a.BitLen()
		}
		block := netip.PrefixFrom(a, bits).Masked()
		if i := slices.IndexFunc(f.Blocks, func(x ippool.Block) bool { return x.Overlaps(block) }); i >= 0 {
			err = fmt.Errorf("node %s has %s", f.Blocks[i].Node, f.Blocks[i].Prefix)
			continue
		}
		if err = b.take(ctx, f, pool, block, fixed, state); err == nil {
			return nil
		}
	}
	return err
}
