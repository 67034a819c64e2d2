package verify

import (
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/answer"
)

// An agent that does not answer does so in other words each time, and is no agent that has nothing to say.
func TestConfirming(t *testing.T) {
	first := reading[answer.Node]{nodes: []string{"a", "b"}, unread: map[string]string{"a": "no answer within 15s"},
		differences: map[string][]string{"b": {"route 1 is missing", "route 2 is missing"}}}
	second := reading[answer.Node]{nodes: []string{"a", "b"}, unread: map[string]string{"a": "no agent runs on it"},
		differences: map[string][]string{"b": {"route 2 is missing", "route 3 is missing"}}}
	report := second.confirming(first).report(func(*NodeReport, answer.Node) {})
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

// What is found of nodes that are gone, or of no node, is told, too.
func TestReportOfNodesThatAreGone(t *testing.T) {
	r := reading[answer.Node]{nodes: []string{"a", "c"}, differences: map[string][]string{"b": {"block 10.50.1.0/26 of pool p belongs to a node that does not exist"}, "": {"IPBlock x: no CIDR"}}}
	report := r.report(func(*NodeReport, answer.Node) {})
	var nodes []string
	for _, n := range report.Nodes {
		nodes = append(nodes, n.Node)
	}
	if want := []string{"", "a", "b", "c"}; !slices.Equal(nodes, want) || report.OK() {
		t.Errorf("told of %q, want %q; all is well: %v", nodes, want, report.OK())
	}
	if got := report.Nodes[2].Differences; len(got) != 1 {
		t.Errorf("of a node that is gone: %q", got)
	}
}

// What is over the bound of an answer is not kept, and known to have been there.
func TestBounded(t *testing.T) {
	b := bounded{most: 5}
	for _, part := range []string{"abc", "de"} {
		if n, err := b.Write([]byte(part)); n != len(part) || err != nil || b.over {
			t.Errorf("%q: %d, %v, %v", part, n, err, b.over)
		}
	}
	for range 2 {
		if n, err := b.Write([]byte("fghij")); n != 5 || err != nil || !b.over || b.String() != "abcde" {
			t.Errorf("%d, %v, %v, %q", n, err, b.over, b.String())
		}
	}
}
