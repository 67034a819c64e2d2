package dataplane

import (
	"sync"

	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/podnet"
)

// Status is what an agent says of its node.
type Status struct {
	// Ready says that the node carries pods.
	Ready bool `json:"ready"`
	// Reason says why it does not.
	Reason string         `json:"reason,omitempty"`
	Plan   podnet.Plan    `json:"plan"`
	Config netconf.Config `json:"config"`
}

// statusBox holds the status of the last pass, for who asks while the next one runs.
type statusBox struct {
	mu     sync.Mutex
	status Status
}

// set replaces the status and returns the one before it.
func (b *statusBox) set(s Status) Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.status
	b.status = s
	return was
}

func (b *statusBox) get() Status {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.status
}
