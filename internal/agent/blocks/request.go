package blocks

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

// Request decides which pool and addresses a pod gets, and takes the blocks that the node needs for that.
func (b *Blocks) Request(ctx context.Context, store *lease.Store, avoid []netip.Prefix, pod, namespace metav1.ObjectMeta) (ippool.Grant, error) {
	wish, err := ippool.ParseWish(pod.Annotations, namespace.Annotations)
	if err != nil {
		return ippool.Grant{}, err
	}
	if grant, ready, err := b.ready(store, wish, pod, namespace); err != nil || ready {
		return grant, err
	}
	done, err := b.decide(ctx)
	if err != nil {
		return ippool.Grant{}, err
	}
	defer done()
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	grant, err := f.Decide(wish, b.node, pod.Namespace, namespace.Labels)
	if err != nil || grant.Pool == "" || grant.Pool == netconf.DefaultPool {
		return grant, err
	}
	state, err := store.State()
	if err != nil {
		return ippool.Grant{}, err
	}
	if err := b.verify(ctx, &f, state); err != nil {
		return ippool.Grant{}, err
	}
	for _, a := range grant.Fixed {
		block := netip.PrefixFrom(a, a.BitLen())
		if slices.ContainsFunc(avoid, block.Overlaps) {
			return ippool.Grant{}, &ippool.Refusal{Text: fmt.Sprintf("%s is of a network that node %s is on itself", a, b.node)}
		}
		if err := b.take(ctx, &f, grant.Pool, block, true, state); err != nil {
			return ippool.Grant{}, err
		}
	}
	b.occupy(f, grant.Pool)
	turn, _ := b.turn(f, state)
	for _, r := range grant.Ordinary {
		if free(turn.Give, grant.Pool, r.Family(), state) > 0 {
			continue
		}
		if err := b.takeFree(ctx, &f, ippool.Need{Pool: grant.Pool, Range: r}, avoid, state); err != nil && !yields(turn.Give, grant.Pool, r.Family(), state) {
			return ippool.Grant{}, err
		}
	}
	turn, _ = b.turn(f, state)
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return grant, err
}

// ready answers a request that needs no request to the API server: the pod is of no pool, or verified blocks have
// addresses. Such pods do not wait for others.
func (b *Blocks) ready(store *lease.Store, wish ippool.Wish, pod, namespace metav1.ObjectMeta) (grant ippool.Grant, ready bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	grant, err = f.Decide(wish, b.node, pod.Namespace, namespace.Labels)
	if err != nil || grant.Pool == "" || grant.Pool == netconf.DefaultPool {
		return grant, true, err
	}
	if len(grant.Fixed) > 0 {
		return grant, false, nil
	}
	state, err := store.State()
	if err != nil {
		return grant, false, err
	}
	b.occupy(f, grant.Pool)
	turn, _ := b.turn(f, state)
	verified := b.certain(f, turn.Give, ipam.State{})
	for _, r := range grant.Ordinary {
		if free(verified, grant.Pool, r.Family(), state) == 0 {
			return grant, false, nil
		}
	}
	_, err = store.SetPools(b.certain(f, turn.Give, state))
	return grant, true, err
}

// occupy marks the node's blocks of a pool as used: a pod is about to get an address.
func (b *Blocks) occupy(f ippool.Facts, pool string) {
	for _, x := range f.Of(b.node) {
		if x.Pool == pool {
			b.busy[x.Prefix] = b.now()
		}
	}
}

// yields says whether an address of a pool that cools down can be given, where no more are to be had.
func yields(give []ipam.Pool, pool string, family inet.Family, state ipam.State) bool {
	_, can := poolOf(give, pool).Yields(family, state)
	return can
}

// free returns how many addresses of a family of a pool can be assigned.
func free(give []ipam.Pool, pool string, family inet.Family, state ipam.State) uint64 {
	u := poolOf(give, pool).Usage(family, state)
	return u.Size - u.InUse - u.Cooling
}

// poolOf is the pool of a name, or one without addresses.
func poolOf(give []ipam.Pool, name string) ipam.Pool {
	if i := slices.IndexFunc(give, func(p ipam.Pool) bool { return p.Name == name }); i >= 0 {
		return give[i]
	}
	return ipam.Pool{}
}
