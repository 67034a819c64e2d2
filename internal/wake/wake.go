// Package wake is how one goroutine has another look again.
package wake

// Signal asks a loop to look again. It carries no value and never waits: asking twice before the loop looks is asking once, and
// what is asked while the loop works is not lost. The loop receives from it as from any channel.
//
// A sync.Cond would do the same, but not in a select beside a context and a timer.
type Signal chan struct{}

// New returns a signal that is not set.
func New() Signal { return make(Signal, 1) }

// Set asks. It may be called by any goroutine.
func (s Signal) Set() {
	select {
	case s <- struct{}{}:
	default:
	}
}
