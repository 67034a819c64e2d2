package agent

import (
	"sync"

	"github.com/fathom-network/fathom/internal/facts/nodestate"
)

// statusBox holds the status of the last pass, for who asks while the next one runs.
type statusBox struct {
	mu     sync.Mutex
	status nodestate.Status
}

// set replaces the status and returns the one before it.
func (b *statusBox) set(s nodestate.Status) nodestate.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.status
	b.status = s
	return was
}

func (b *statusBox) get() nodestate.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status
}
