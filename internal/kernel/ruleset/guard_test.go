package ruleset_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// guarded returns the guard of the first of n nodes with VXLAN.
func guarded(t testing.TB, nodes int, config podnet.Config) podnet.Guard {
	t.Helper()
	config.Mode = podnet.VXLAN
	var all []podnet.Node
	for i := range nodes {
		all = append(all, podnet.Node{Name: fmt.Sprintf("node-%04d", i),
			Addrs:    []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.200.%d.%d", i/200, i%200+2)), netip.MustParseAddr(fmt.Sprintf("fd00:200::%x", i+2))},
			PodCIDRs: prefixes(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), fmt.Sprintf("fd00:10:244:%x::/64", i))})
	}
	plan, problems := podnet.NewPlan(all[0].Name, []podnet.Interface{{Name: "eth0", MTU: 1500, Addrs: prefixes("10.200.0.2/16", "fd00:200::2/64")}}, all, config)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	return plan.Guard
}

func TestGuard(t *testing.T) {
	if podlink.Group != ruleset.PodGroup {
		t.Errorf("pods' devices are of group %d, and the rules are for %d", podlink.Group, ruleset.PodGroup)
	}
	n, r := space(t)
	nft(t, n, "add", "table", "inet", "other", "{ chain c { type filter hook forward priority 0; } ; }")
	foreign := nft(t, n, "list", "table", "inet", "other")
	open := podnet.Config{NonMasquerade: prefixes("192.168.0.0/16"), NoMasquerade6: true, LinkLocal: podnet.Metadata}
	check := func(want podnet.Guard, changes diff.Count) {
		t.Helper()
		got, err := r.SetGuard(want)
		testenv.Must(t, err)
		if got != changes {
			t.Errorf("changed %+v, want %+v", got, changes)
		}
		if again, err := r.SetGuard(want); err != nil || again != (diff.Count{}) {
			t.Errorf("the second time changes %+v, %v", again, err)
		}
		have, err := r.Guard(want)
		testenv.Must(t, err)
		if !reflect.DeepEqual(have, want) {
			t.Errorf("read back\n%s\nwant\n%s", have, want)
		}
		if got := nft(t, n, "list", "table", "inet", "other"); got != foreign {
			t.Errorf("another table became\n%s", got)
		}
	}
	g := guarded(t, 3, open)
	check(g, diff.Count{Added: 1})
	want := isGolden(t, n, ruleset.GuardTable, "testdata/guard.nft")

	// One more node adds two elements of nodes, two of the cluster's pods, two of its nodes, and four of senders.
	check(guarded(t, 4, open), diff.Count{Added: 10})
	check(g, diff.Count{Removed: 10})
	check(guarded(t, 3, podnet.Config{}), diff.Count{Removed: 2 + 12 + 3})
	check(g, diff.Count{Added: 2 + 12 + 3})
	wide := g
	wide.Senders = []podnet.Sender{{Node: g.Senders[0].Node, Range: netip.MustParsePrefix("10.0.0.0/8")}, // overlaps what was there
		{Node: g.Senders[0].Node, Range: netip.MustParsePrefix("0.0.0.0/32")}, {Node: g.Senders[0].Node, Range: netip.MustParsePrefix("::/0")}}
	wide.Senders[0], wide.Senders[1] = wide.Senders[1], wide.Senders[0]
	check(wide, diff.Count{Added: 1}) // another length needs another rule
	check(g, diff.Count{Added: 1})
	other := g
	other.Port = 8472
	check(other, diff.Count{Added: 1})
	if have, err := r.Guard(g); err != nil || have.Port != 0 {
		t.Errorf("the rules of another port: %v, %v", have, err)
	}
	other = g
	other.VNI = 7
	check(other, diff.Count{Added: 1})
	check(g, diff.Count{Added: 1})

	for _, tc := range []struct {
		drift   string
		changes diff.Count
	}{
		{"add element inet T nodes4 { 198.51.100.1 }", diff.Count{Removed: 1}},
		{"flush set inet T tunnel_senders4_4_24", diff.Count{Added: 2}},
		{"add element inet T tunnel_senders4_4_24 { 10.200.0.3 . 0.0.0.0 }", diff.Count{Removed: 1}},
		{"add element inet T tunnel_senders4_6_64 { 10.200.0.3 . fe80::1 }", diff.Count{Removed: 1}}, // no rule looks it up
		{"flush chain inet T prerouting", diff.Count{Added: 1}},
		{"insert rule inet T to_tunnel accept", diff.Count{Added: 1}},
		{"add chain inet T more", diff.Count{Added: 1}},
		{"delete table inet T", diff.Count{Added: 1}},
	} {
		t.Run(tc.drift, func(t *testing.T) {
			nft(t, n, strings.Fields(strings.ReplaceAll(tc.drift, " T", " "+ruleset.GuardTable))...)
			if have, err := r.Guard(g); err != nil || reflect.DeepEqual(have, g) {
				t.Errorf("passes for what it should be: %v", err)
			}
			check(g, tc.changes)
			if got := nft(t, n, "list", "table", "inet", ruleset.GuardTable); got != want {
				t.Errorf("got:\n%s", got)
			}
		})
	}
	closed := guarded(t, 3, podnet.Config{})
	_, err := r.SetGuard(closed)
	testenv.Must(t, err)
	nft(t, n, "add", "element", "inet", ruleset.GuardTable, "link_local_open4", "{ 169.254.169.254 }")
	check(closed, diff.Count{Removed: 1})
	for range 2 {
		testenv.Must(t, r.Delete(ruleset.GuardTable))
	}
	if got := nft(t, n, "list", "ruleset"); got != foreign {
		t.Errorf("left behind:\n%s", got)
	}
	if have, err := r.Guard(g); err != nil || !reflect.DeepEqual(have, podnet.Guard{}) {
		t.Errorf("without a table: %v, %v", have, err)
	}
}

func BenchmarkGuard(b *testing.B) {
	_, r := space(b)
	full, fewer := guarded(b, 1000, podnet.Config{}), guarded(b, 999, podnet.Config{})
	set := func(g podnet.Guard) {
		_, err := r.SetGuard(g)
		testenv.Must(b, err)
	}
	b.Run("cold", func(b *testing.B) {
		for b.Loop() {
			testenv.Must(b, r.Delete(ruleset.GuardTable))
			set(full)
		}
	})
	b.Run("one node", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			set([]podnet.Guard{fewer, full}[i%2])
		}
	})
}
