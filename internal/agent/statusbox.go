package agent

import (
	"sync"

	"github.com/fathom-network/fathom/internal/facts/answer"
)

// statusBox holds the status of the last pass, so that readers see it while the next pass runs.
type statusBox struct {
	mu     sync.Mutex
	status answer.Status
}

// set replaces the status and returns the one before it.
func (b *statusBox) set(s answer.Status) answer.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.status
	b.status = s
	return was
}

func (b *statusBox) get() answer.Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status
}
