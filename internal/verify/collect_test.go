package verify

import (
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/nodestate"
)

// An agent that does not answer does so in other words each time, and is no agent that has nothing to say.
func TestConfirming(t *testing.T) {
	first := reading[nodestate.State]{nodes: []string{"a", "b"}, unread: map[string]string{"a": "no answer within 15s"},
		differences: map[string][]string{"b": {"route 1 is missing", "route 2 is missing"}}}
	second := reading[nodestate.State]{nodes: []string{"a", "b"}, unread: map[string]string{"a": "no agent runs on it"},
		differences: map[string][]string{"b": {"route 2 is missing", "route 3 is missing"}}}
	report := second.confirming(first).report(func(*NodeReport, nodestate.State) {})
	if got, want := report.Nodes[0].Differences, []string{"no agent runs on it"}; !slices.Equal(got, want) {
		t.Errorf("of a node that is not read: %v, want %v", got, want)
	}
	if got, want := report.Nodes[1].Differences, []string{"route 2 is missing"}; !slices.Equal(got, want) {
		t.Errorf("of what came and went: %v, want %v", got, want)
	}
	if report.OK() {
		t.Error("all is well")
	}
}
