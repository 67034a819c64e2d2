package diff_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
)

func TestCompare(t *testing.T) {
	key := func(s string) byte { return s[0] }
	for _, tc := range []struct{ want, have, result string }{
		{"", "", "+[] ~[] -[]"},
		{"a1", "", "+[a1] ~[] -[]"},
		{"", "a1", "+[] ~[] -[a1]"},
		{"a1", "a1", "+[] ~[] -[]"},
		{"a1", "a2", "+[] ~[{a2 a1}] -[]"},
		{"a1", "a2 a1", "+[] ~[] -[a2]"},
		{"a1", "a1 a2", "+[] ~[] -[a2]"},
		{"a1", "a1 a1", "+[] ~[] -[a1]"},
		{"a1 b1 c1", "a1 c1", "+[b1] ~[] -[]"},
		{"a1 b1 c1", "a1 b2 b1 c1 c1", "+[] ~[] -[b2 c1]"},
		{"a1 c1", "a1 b1 c1", "+[] ~[] -[b1]"},
		{"b1 a1", "a1 b1", "+[] ~[] -[]"},
		{"a1", "a2 a3", "+[] ~[{a2 a1}] -[a3]"},
		{"a1 b1", "c1 b2", "+[a1] ~[{b2 b1}] -[c1]"},
	} {
		d := diff.Compare(strings.Fields(tc.want), strings.Fields(tc.have), key)
		if got := fmt.Sprintf("+%v ~%v -%v", d.Add, d.Correct, d.Remove); got != tc.result {
			t.Errorf("want %q, have %q: %s, want %s", tc.want, tc.have, got, tc.result)
		}
	}
}
