package ruleset_test

import (
	"cmp"
	"reflect"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// bare are facts without what the kernel has in comments alone, in one order.
func bare(f policy.Facts) policy.Facts {
	g := policy.Facts{Addrs: f.Addrs, Classes: map[policy.Number]*policy.Class{}}
	for n, c := range f.Classes {
		d := &policy.Class{Number: n, Direction: c.Direction, Tiers: c.Tiers}
		for _, a := range c.Allows {
			a.By = policy.Reason{}
			d.Allows = append(d.Allows, a)
		}
		for _, b := range c.Blocks {
			b.By = policy.Reason{}
			d.Blocks = append(d.Blocks, b)
		}
		grant := func(a, b policy.Grant) int {
			return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.From, b.From))
		}
		slices.SortFunc(d.Allows, func(a, b policy.Allow) int { return cmp.Or(cmp.Compare(a.Peer, b.Peer), grant(a.Grant, b.Grant)) })
		slices.SortFunc(d.Blocks, func(a, b policy.AllowBlock) int { return cmp.Or(a.First.Compare(b.First), grant(a.Grant, b.Grant)) })
		g.Classes[n] = d
	}
	return g
}

// TestReadPolicies: what is read back is what was set.
func TestReadPolicies(t *testing.T) {
	n, r := space(t)
	var reader *ruleset.Ruleset // which knows nothing but what it reads
	testenv.Must(t, n.Do(func() (err error) {
		reader, err = ruleset.Open("/proc/thread-self/ns/net")
		return err
	}))
	defer reader.Close()
	if _, _, found, err := reader.Policies(); found || err != nil {
		t.Errorf("without a table: found %v, %v", found, err)
	}
	for name, m := range map[string]*policy.Model{"NetworkPolicies": modelOf(everyKind()...), "tiers": modelOf(append(everyKind(), everyTier()...)...),
		"audited": modelOf(audited(everyKind())...), "audited behind tiers": modelOf(append(audited(everyKind()), everyTier()...)...)} {
		f := m.Facts()
		_, err := r.SetPolicies(f, ownRanges)
		testenv.Must(t, err)
		got, ranges, found, err := reader.Policies()
		if err != nil || !found || !slices.Equal(inet.Disjoint(ranges), inet.Disjoint(ownRanges)) {
			t.Errorf("%s: found %v, ranges %v, %v", name, found, ranges, err)
		}
		if got, want := bare(got), bare(f); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
			for n, c := range want.Classes {
				t.Logf("class %x: got %+v, want %+v", n, got.Classes[n], c)
			}
		}
	}
	nft(t, n, "insert", "rule", "inet", "fathom-policy", "judge_ingress", "return")
	if _, _, found, err := reader.Policies(); found || err != nil {
		t.Errorf("a table with another rule is found: %v, %v", found, err)
	}
}
