package blocks

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// takenError says that another node has a block or a part of it.
type takenError struct{ prefix netip.Prefix }

func (e *takenError) Error() string {
	return fmt.Sprintf("%s was taken by another node a moment ago; this one tries again", e.prefix)
}

// drop forgets a block, except for what the watches show.
func (b *Blocks) drop(f *ippool.Facts, x ippool.Block) {
	f.Blocks = slices.DeleteFunc(f.Blocks, func(y ippool.Block) bool { return y.UID == x.UID })
	delete(b.made, x.UID)
	delete(b.verified, x.UID)
	delete(b.busy, x.Prefix)
}

// giveBack deletes a block from which no address is assigned any more; the caller drops it.
func (b *Blocks) giveBack(ctx context.Context, x ippool.Block) error {
	delete(b.verified, x.UID)
	if err := b.ask(func() error { return b.api.DeleteBlock(ctx, x.Name, x.UID) }); err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return err
	}
	b.log.Info("gave a block back", "pool", x.Pool, "block", x.Prefix)
	b.gone[x.UID] = b.now()
	return nil
}

// take creates a block of a prefix for this node.
func (b *Blocks) take(ctx context.Context, f *ippool.Facts, pool string, p netip.Prefix, fixed bool, state ipam.State) error {
	object := &v1alpha1.IPBlock{
		ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(p), OwnerReferences: []metav1.OwnerReference{kube.NodeOwner(b.node, f.NodeUID(b.node))}},
		Spec:       v1alpha1.IPBlockSpec{Pool: pool, CIDR: p.String(), Node: b.node, Fixed: fixed},
	}
	var made *v1alpha1.IPBlock
	err := b.ask(func() (err error) {
		made, err = b.api.CreateBlock(ctx, object)
		return err
	})
	if apierrors.IsAlreadyExists(err) {
		return &takenError{p}
	}
	if err != nil {
		return err // if it was made all the same, the watches tell
	}
	b.made[made.UID] = madeBlock{made, b.now()}
	mine, _, _ := ippool.ReadBlock(made)
	f.Blocks = append(f.Blocks, mine)
	b.busy[p] = b.now()
	if err := b.verify(ctx, f, state); !b.verified[made.UID] {
		return err
	}
	b.log.Info("took a block", "pool", pool, "block", p)
	return nil
}

// takeFree takes a free block of a pool.
func (b *Blocks) takeFree(ctx context.Context, f *ippool.Facts, n ippool.Need, avoid []netip.Prefix, state ipam.State) error {
	taken := slices.Concat(f.Taken(), avoid)
	var err error
	for range attempts {
		p, found := ippool.FreeBlock(n.Range, taken, b.node)
		if !found {
			here := ipam.Pool{Name: n.Pool, Whole: true}
			for _, x := range f.Of(b.node) {
				if x.Pool == n.Pool && n.Overlaps(x.Prefix) {
					here.Ranges = append(here.Ranges, x.Prefix)
				}
			}
			u := here.Usage(n.Family(), state)
			return f.Full(n, u.InUse, u.Cooling, u.Size)
		}
		var other *takenError
		if err = b.take(ctx, f, n.Pool, p, false, state); !errors.As(err, &other) {
			return err
		}
		taken = append(taken, p)
	}
	return err
}
