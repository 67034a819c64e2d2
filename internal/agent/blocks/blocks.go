// Package blocks keeps a node's blocks of address pools. It takes one when a pod needs it, verifies that no other node has
// any of its addresses, and gives it back. docs/design/ipam.md says why two nodes never have the same address.
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

// Blocks takes blocks of address pools for a node and gives them back: docs/design/ipam.md.
type Blocks struct {
	node string
	api  API
	see  func() ippool.Objects // as the watches have it
	log  *slog.Logger
	now  func() time.Time

	// deciding is held while a goroutine takes, verifies or gives back blocks, including requests to the API server.
	deciding chan struct{}

	// mu guards the fields below. It is not held during requests to the API server: passes, and pods for which there are
	// addresses, continue meanwhile.
	mu sync.Mutex
	// What this node did or found out, and the watches may not show yet.
	made map[types.UID]madeBlock
	gone map[types.UID]time.Time
	// verified are the blocks of which no other node has any address.
	verified map[types.UID]bool
	busy     map[netip.Prefix]time.Time // when a block was used last
	unheard  int                        // questions to the API server that had no answer, or that it failed to answer
}

// madeBlock is a block with the time at which this node created it.
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

// Blocks returns the current blocks of all nodes, including everything that was created before the call.
func (s Server) Blocks(ctx context.Context) ([]*v1alpha1.IPBlock, error) {
	return kube.List(ctx, s.Client, kube.IPBlocks, kube.Selection{})
}

// New returns the blocks of a node. see returns what the watches have; Blocks adds what the node has done since.
func New(node string, api API, see func() ippool.Objects, log *slog.Logger) *Blocks {
	return &Blocks{node: node, api: api, see: see, log: log, now: time.Now, deciding: make(chan struct{}, 1),
		made: map[types.UID]madeBlock{}, gone: map[types.UID]time.Time{}, verified: map[types.UID]bool{}, busy: map[netip.Prefix]time.Time{}}
}

const (
	// rest is how long an empty block is kept: pods come and go in bursts.
	rest = time.Minute
	// restFixed is the same for a requested address: its pod may be waiting for it on another node.
	restFixed = 5 * time.Second
	// forget is how long this node's own actions take precedence over the watches that do not show them.
	forget = 10 * time.Minute
	// attempts is how many blocks a node tries to take before it lets the pod wait.
	attempts = 8
)

// facts returns the state of the watches, corrected by what this node has done since.
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

// decide waits until no other goroutine decides; done releases it.
func (b *Blocks) decide(ctx context.Context) (done func(), err error) {
	select {
	case b.deciding <- struct{}{}:
		return func() { <-b.deciding }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the API server to answer about other blocks of this node: %w", ctx.Err())
	}
}

// ask sends a request to the API server without the lock, which the caller holds before and after.
func (b *Blocks) ask(question func() error) error {
	b.mu.Unlock()
	err := question()
	b.mu.Lock()
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
		b.unheard++
	}
	return err
}

// failures counts the requests that the API server did not answer.
func (b *Blocks) failures() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.unheard
}

// list returns the current blocks from the API server.
func (b *Blocks) list(ctx context.Context) (objects []*v1alpha1.IPBlock, err error) {
	err = b.ask(func() (err error) {
		objects, err = b.api.Blocks(ctx)
		return err
	})
	return objects, err
}

// All returns all nodes' used blocks, including one that this node has just taken, and the refused ones.
func (b *Blocks) All() ([]ippool.Block, []ippool.RefusedBlock) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.facts()
	return f.Blocks, f.Refused
}
