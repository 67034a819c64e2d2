package ruleset_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// space is a namespace, removed at the end of the test, with its rule set.
func space(t testing.TB) (*link.Namespace, *ruleset.Ruleset) {
	t.Helper()
	n, path := linktest.NamespaceAt(t)
	r, err := ruleset.Open(path)
	testenv.Must(t, err)
	t.Cleanup(r.Close)
	return n, r
}

func nft(t testing.TB, n *link.Namespace, args ...string) string {
	t.Helper()
	return linktest.Run(t, n, append([]string{"nft"}, args...)...)
}

// isGolden compares a table with a file, as nft prints it, and returns what is in the file.
func isGolden(t testing.TB, n *link.Namespace, table, file string) string {
	t.Helper()
	got := nft(t, n, "list", "table", "inet", table)
	if *update {
		testenv.Must(t, os.WriteFile(file, []byte(got), 0o644))
	}
	want, err := os.ReadFile(file)
	testenv.Must(t, err)
	if got != string(want) {
		t.Errorf("got:\n%s\nwant (%s; -update rewrites it):\n%s", got, file, want)
	}
	return string(want)
}

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

func cluster(nodes int) podnet.Masquerade {
	m := podnet.Masquerade{
		Sources: prefixes("10.100.0.0/24", "fd00:10:244::/64"),
		Others:  prefixes("0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32", "fe80::/10", "ff00::/8"),
	}
	for f := range 2 {
		for i := range nodes {
			if f == 0 {
				m.Pods = append(m.Pods, netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250)))
				m.Nodes = append(m.Nodes, netip.MustParseAddr(fmt.Sprintf("10.200.%d.%d", i/200, i%200+2)))
			} else {
				m.Pods = append(m.Pods, netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", i)))
				m.Nodes = append(m.Nodes, netip.MustParseAddr(fmt.Sprintf("fd00:200::%x", i+2)))
			}
		}
	}
	return m
}

func TestMasquerade(t *testing.T) {
	n, r := space(t)
	nft(t, n, "add", "table", "inet", "other", "{ chain c { type nat hook postrouting priority 100; } ; }")
	foreign := nft(t, n, "list", "table", "inet", "other")
	m := cluster(3)
	check := func(want podnet.Masquerade, changes diff.Count) {
		t.Helper()
		got, err := r.SetMasquerade(want)
		testenv.Must(t, err)
		if got != changes {
			t.Errorf("changed %+v, want %+v", got, changes)
		}
		if again, err := r.SetMasquerade(want); err != nil || again != (diff.Count{}) {
			t.Errorf("the second time changes %+v, %v", again, err)
		}
		have, err := r.Masquerade()
		testenv.Must(t, err)
		if !reflect.DeepEqual(have, want) {
			t.Errorf("read back\n%s\nwant\n%s", have, want)
		}
		if got := nft(t, n, "list", "table", "inet", "other"); got != foreign {
			t.Errorf("another table became\n%s", got)
		}
	}
	check(m, diff.Count{Added: 1})
	const golden = "testdata/masquerade.nft"
	want := isGolden(t, n, ruleset.MasqueradeTable, golden)
	// nft accepts its own output, and creates the same table from it.
	nft(t, n, "delete", "table", "inet", ruleset.MasqueradeTable)
	nft(t, n, "-f", golden)
	if again := nft(t, n, "list", "table", "inet", ruleset.MasqueradeTable); again != want {
		t.Errorf("nft makes of it\n%s", again)
	}

	check(m, diff.Count{}) // a table by nft counts as ours
	check(cluster(5), diff.Count{Added: 8})
	check(cluster(3), diff.Count{Removed: 8})
	wide := cluster(3)
	wide.Pods = prefixes("10.100.0.0/16", "fd00:10:244::/56") // overlaps what was there
	check(wide, diff.Count{Added: 2, Removed: 6})
	check(cluster(3), diff.Count{Added: 6, Removed: 2})
	off := cluster(3)
	off.Sources = prefixes("10.100.0.0/24") // IPv6 as it is
	check(off, diff.Count{Removed: 1})
	check(m, diff.Count{Added: 1})

	for _, tc := range []struct {
		drift   string
		changes diff.Count
	}{
		{"add element inet T pod_cidrs4 { 172.16.0.0/12 }", diff.Count{Removed: 1}},
		{"delete element inet T node_addrs6 { fd00:200::2 }", diff.Count{Added: 1}},
		{"flush set inet T pod_cidrs4", diff.Count{Added: 3}},
		{"add element inet T pod_cidrs4 { 172.16.0.3-172.16.0.9 }", diff.Count{Removed: 1}},
		{"flush chain inet T postrouting", diff.Count{Added: 1}},
		{"add rule inet T postrouting accept", diff.Count{Added: 1}},
		{"insert rule inet T postrouting ip saddr @own_pods4 return", diff.Count{Added: 1}},
		{"add chain inet T more", diff.Count{Added: 1}},
		{"add set inet T more { type ipv4_addr; }", diff.Count{Added: 1}},
		{"delete table inet T", diff.Count{Added: 1}},
	} {
		t.Run(tc.drift, func(t *testing.T) {
			nft(t, n, strings.Fields(strings.ReplaceAll(tc.drift, " T", " "+ruleset.MasqueradeTable))...)
			if have, err := r.Masquerade(); err != nil || reflect.DeepEqual(have, m) {
				t.Errorf("passes for what it should be: %v", err)
			}
			check(m, tc.changes)
			if got := nft(t, n, "list", "table", "inet", ruleset.MasqueradeTable); got != string(want) {
				t.Errorf("got:\n%s", got)
			}
		})
	}
	for range 2 {
		testenv.Must(t, r.Delete(ruleset.MasqueradeTable))
	}
	if got := nft(t, n, "list", "ruleset"); got != foreign {
		t.Errorf("left behind:\n%s", got)
	}
	if have, err := r.Masquerade(); err != nil || !reflect.DeepEqual(have, podnet.Masquerade{}) {
		t.Errorf("without a table: %v, %v", have, err)
	}
}

func BenchmarkMasquerade(b *testing.B) {
	n, r := space(b)
	full, fewer := cluster(1000), cluster(999)
	set := func(m podnet.Masquerade) {
		_, err := r.SetMasquerade(m)
		testenv.Must(b, err)
	}
	b.Run("cold", func(b *testing.B) {
		for b.Loop() {
			testenv.Must(b, r.Delete(ruleset.MasqueradeTable))
			set(full)
		}
	})
	b.Run("one node", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			set([]podnet.Masquerade{fewer, full}[i%2])
		}
	})
	b.Run("one node after others changed theirs", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			b.StopTimer()
			nft(b, n, []string{"add", "delete"}[i%2], "table", "inet", "other")
			b.StartTimer()
			set([]podnet.Masquerade{fewer, full}[i%2])
		}
	})
}
