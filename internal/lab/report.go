package lab

import (
	"sync"
	"time"
)

// Event tells of a step: once when it begins and once when it ends.
type Event struct {
	Cluster string // empty for what is the whole lab's
	Step    string
	Detail  string // what the step is doing, while it takes long
	Began   time.Time
	Ended   time.Time // zero while the step goes on
	Err     error
}

// Report is told of every event, one at a time.
type Report func(Event)

// timeline calls report for the steps of concurrent goroutines.
type timeline struct {
	mu     sync.Mutex
	report Report
}

func (t *timeline) tell(e Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.report != nil {
		t.report(e)
	}
}

// step runs f as a step of the cluster.
func (t *timeline) step(cluster, name string, f func() error) error {
	return t.detailed(cluster, name, func(func(string)) error { return f() })
}

// detailed runs f as a step that says what it is doing.
func (t *timeline) detailed(cluster, name string, f func(func(string)) error) error {
	e := Event{Cluster: cluster, Step: name, Began: time.Now()}
	t.tell(e)
	err := f(func(detail string) {
		now := e
		now.Detail = detail
		t.tell(now)
	})
	e.Ended, e.Err = time.Now(), err
	t.tell(e)
	return err
}
