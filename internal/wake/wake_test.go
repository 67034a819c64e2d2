package wake_test

import (
	"testing"

	"github.com/fathom-network/fathom/internal/wake"
)

// TestSignal: asking many times is asking once, and what is asked after the loop has begun to look is kept.
func TestSignal(t *testing.T) {
	s := wake.New()
	isSet := func() bool {
		select {
		case <-s:
			return true
		default:
			return false
		}
	}
	if isSet() {
		t.Error("a new signal is set")
	}
	s.Set()
	s.Set()
	if !isSet() || isSet() {
		t.Error("a signal that was set twice is not received once")
	}
	s.Set()
	if !isSet() {
		t.Error("a signal that was set after it was received is lost")
	}
}
