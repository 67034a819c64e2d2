package blocks

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/wake"
)

// Keeper keeps the node's blocks in a loop of its own: taking, returning and verifying a block are requests to the API server, and a
// pass must not wait for them. A pass sees the result the next time.
type Keeper struct {
	blocks  *Blocks
	leases  string // their directory
	changed func() // when Set returns something else
	kick    wake.Signal

	mu       sync.Mutex
	avoid    []netip.Prefix
	coolDown time.Duration
	problems []string
}

// NewKeeper returns the keeper of a node's blocks, given the directory of its leases. changed is called when Set would return
// something else.
func NewKeeper(b *Blocks, leases string, changed func()) *Keeper {
	return &Keeper{blocks: b, leases: leases, changed: changed, kick: wake.New()}
}

// Set passes the networks from which no block may be taken, and wakes the loop. It returns the problems of the last round, and does
// not wait.
func (k *Keeper) Set(avoid []netip.Prefix, coolDown time.Duration) (problems []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.avoid, k.coolDown = avoid, coolDown
	k.kick.Set()
	return k.problems
}

// Run keeps the blocks until the context ends. After a failure it backs off, and events do not cut the wait short: a server that
// refuses is not asked as often as something changes.
func (k *Keeper) Run(ctx context.Context) {
	failures := 0
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.kick:
		case <-again:
		}
		wait, ok := k.keep(ctx)
		again = nil
		if wait > 0 {
			again = time.After(wait)
		}
		if ok {
			failures = 0
			continue
		}
		pause := min(firstPause<<min(failures, 10), lastPause)
		failures++
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		again = time.After(0)
	}
}

// apiPatience bounds what one round asks an API server that does not answer.
const apiPatience = 2 * time.Second

// firstPause and lastPause are the waits after the first failure and after many.
const firstPause, lastPause = 250 * time.Millisecond, 10 * time.Second

// keep runs one round. wait is the time until the next round if nothing else happens. ok is false if a request failed; an exhausted
// or invalid pool is no failure.
func (k *Keeper) keep(ctx context.Context) (wait time.Duration, ok bool) {
	k.mu.Lock()
	avoid, coolDown := k.avoid, k.coolDown
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	var problems []string
	failed := k.blocks.failures()
	store, err := lease.Open(k.leases, coolDown)
	if err == nil {
		problems, wait, err = k.blocks.Keep(ctx, store, avoid)
	}
	if err != nil {
		problems = append(problems, answer.OneLine(fmt.Errorf("keep the blocks of address pools: %w", err)))
	}
	slices.Sort(problems)
	k.mu.Lock()
	differs := !slices.Equal(k.problems, problems)
	k.problems = problems
	k.mu.Unlock()
	if differs {
		k.changed()
	}
	return wait, err == nil && k.blocks.failures() == failed
}
