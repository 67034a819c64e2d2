package agent

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

// turning is whether the agent's loop goes round, so that one that hangs is started anew: traffic does not notice.
type turning struct {
	patience time.Duration
	last     atomic.Pointer[time.Time]
}

// passPatience is how old the end of the last pass may be. One is made each resync; what it takes on a node that is very
// busy is a matter of seconds.
func passPatience(resync time.Duration) time.Duration { return 2*resync + 2*time.Minute }

// set notes that a pass has ended, however it went.
func (t *turning) set(now time.Time) { t.last.Store(&now) }

// alive says why the agent should be started anew, if it should.
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
