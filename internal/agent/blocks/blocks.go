// Package blocks keeps the blocks of address pools that a node has: it takes one when a pod needs it, makes certain that no
// other node has any of its addresses, and gives it back. docs/design/ipam.md says why no address is ever of two nodes.
package blocks

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Blocks takes blocks of address pools for a node and gives them back; docs/design/ipam.md says why no address is
// ever of two nodes.
type Blocks struct {
	node string
	api  API
	see  func() ippool.Objects // as the watches have it
	log  *slog.Logger
	now  func() time.Time

	// deciding is held by the one that takes, makes certain of, or gives back blocks, also while the API server is asked.
	deciding chan struct{}

	// mu guards what follows, and is not held while the API server is asked: passes, and pods for which there are
	// addresses, go on meanwhile.
	mu sync.Mutex
	// What this node did, or found out, and the watches may not show yet.
	made map[types.UID]madeBlock
	gone map[types.UID]time.Time
	// verified are those of which it is certain that no other node has any of their addresses.
	verified map[types.UID]bool
	busy     map[netip.Prefix]time.Time // when a block was used last
	unheard  int                        // questions to the API server that had no answer, or that it failed to answer
}

// madeBlock is a block, and when it was made by the clock of this node.
type madeBlock struct {
	object *v1alpha1.IPBlock
	when   time.Time
}

// API is what Blocks needs of the API server.
type API interface {
	Blocks(context.Context) ([]*v1alpha1.IPBlock, error) // as they are now
	CreateBlock(context.Context, *v1alpha1.IPBlock) (*v1alpha1.IPBlock, error)
	DeleteBlock(context.Context, string, types.UID) error
	SetBlockOwner(context.Context, string, types.UID, metav1.OwnerReference) error
}

// Server is the API of an API server.
type Server struct{ *kube.Client }

// Blocks returns the blocks of all nodes as they are now: what was made before the call is among them, whoever made it.
func (s Server) Blocks(ctx context.Context) ([]*v1alpha1.IPBlock, error) {
	return kube.List(ctx, s.Client, kube.IPBlocks, kube.Selection{})
}

// New returns the blocks of a node. see returns what the watches have; what the node itself has done since is added.
func New(node string, api API, see func() ippool.Objects, log *slog.Logger) *Blocks {
	return &Blocks{node: node, api: api, see: see, log: log, now: time.Now, deciding: make(chan struct{}, 1),
		made: map[types.UID]madeBlock{}, gone: map[types.UID]time.Time{}, verified: map[types.UID]bool{}, busy: map[netip.Prefix]time.Time{}}
}

const (
	// rest is how long an empty block is kept: pods come and go in bursts.
	rest = time.Minute
	// restFixed is the same for an address that a pod asked for, which may wait for it on another node by now.
	restFixed = 5 * time.Second
	// forget is how long what this node did, and the watches do not show, is remembered against them.
	forget = 10 * time.Minute
	// attempts is how many blocks a node tries to take before it lets the pod wait.
	attempts = 8
)

// facts are what the watches say, corrected by what this node has done since.
func (b *Blocks) facts() ippool.Facts {
	o := b.see()
	seen := map[types.UID]bool{}
	o.Blocks = slices.DeleteFunc(slices.Clone(o.Blocks), func(x *v1alpha1.IPBlock) bool {
		seen[x.UID] = true
		_, gone := b.gone[x.UID]
		return gone
	})
	for uid, x := range b.made {
		if seen[uid] || b.now().Sub(x.when) > forget {
			delete(b.made, uid)
			continue
		}
		o.Blocks = append(o.Blocks, x.object)
	}
	for uid, when := range b.gone {
		if !seen[uid] && b.now().Sub(when) > forget {
			delete(b.gone, uid)
		}
	}
	return ippool.Read(o)
}

// decide waits until nobody else decides; done ends that.
func (b *Blocks) decide(ctx context.Context) (done func(), err error) {
	select {
	case b.deciding <- struct{}{}:
		return func() { <-b.deciding }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the API server to answer about other blocks of this node: %w", ctx.Err())
	}
}

// ask asks the API server without the lock, which is the caller's before and after that.
func (b *Blocks) ask(question func() error) error {
	b.mu.Unlock()
	err := question()
	b.mu.Lock()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		b.unheard++
	}
	return err
}

// failures counts the questions that the API server did not answer.
func (b *Blocks) failures() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unheard
}

// list is which blocks there are, as the API server has them now.
func (b *Blocks) list(ctx context.Context) (objects []*v1alpha1.IPBlock, err error) {
	err = b.ask(func() (err error) {
		objects, err = b.api.Blocks(ctx)
		return err
	})
	return objects, err
}

// All are the blocks of all nodes that are used, also one that this node has taken a moment ago, and those that are not.
func (b *Blocks) All() ([]ippool.Block, []ippool.RefusedBlock) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	return f.Blocks, f.Refused
}
