package agent

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

// turning is the liveness of the agent's loop: the kubelet restarts an agent that hangs, which traffic does not notice.
type turning struct {
	patience time.Duration
	last     atomic.Pointer[time.Time]
}

// passPatience is the greatest age of the last pass's end. A pass runs at least every resync, and takes seconds even on a very busy
// node.
func passPatience(resync time.Duration) time.Duration { return 2*resync + 2*time.Minute }

// set notes that a pass has ended, however it went.
func (t *turning) set(now time.Time) { t.last.Store(&now) }

// alive returns why the agent should be restarted, or nil.
func (t *turning) alive(now time.Time) error {
	if last := t.last.Load(); last != nil && now.Sub(*last) > t.patience {
		return fmt.Errorf("the last pass over the node ended %v ago: the agent hangs", now.Sub(*last).Round(time.Second))
	}
	return nil
}

// ServeHTTP implements http.Handler: it answers the kubelet's probe.
func (t *turning) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	if err := t.alive(time.Now()); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}
