package nft

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// kernels are all there are: the fake one, and as root Linux.
func kernels(t *testing.T, f func(t *testing.T, k Kernel)) {
	t.Run("fake", func(t *testing.T) { f(t, NewFake()) })
	t.Run("linux", func(t *testing.T) {
		_, path := linktest.NamespaceAt(t)
		c, err := Open(path)
		testenv.Must(t, err)
		t.Cleanup(c.Close)
		f(t, c)
	})
}

// pod is a part like those of policies: it goes to a chain by its addresses, and others may go there, too, and meet the same servers.
type pod struct {
	number int
	chain  int  // zero is its own, with rules
	server byte // zero is none
	rules  int
}

func podAddr(n int) string { return string([]byte{10, 0, byte(n >> 8), byte(n)}) }

func (p pod) Equal(other pod) bool { return p == other }

func (p pod) Elements(yield func(set string, e Element)) {
	yield("pods", Element{Key: podAddr(p.number), Verdict: true, Code: expr.VerdictGoto, Value: p.verdicts().name(), Comment: fmt.Sprint("rules ", p.rules)})
	if p.server != 0 {
		yield("meets", Element{Key: podAddr(p.number), Value: serverAddr(p.server)})
	}
}

func (p pod) Shares(yield func(Shared)) {
	yield(p.verdicts())
	if p.server != 0 {
		yield(server(p.server))
	}
}

// verdicts is a chain: of a pod alone with so many rules, or of all that have one of its number.
type verdicts struct{ pod, rules, shared int }

func (p pod) verdicts() verdicts {
	if p.chain > 0 {
		return verdicts{shared: p.chain}
	}
	return verdicts{pod: p.number, rules: p.rules}
}

func (v verdicts) name() string {
	if v.shared > 0 {
		return fmt.Sprint("from_", v.shared)
	}
	return fmt.Sprint("of_", v.pod)
}

func (v verdicts) Chain() *Chain {
	c := &Chain{Name: v.name()}
	for i := range v.rules {
		c.Add(fmt.Sprint("counts ", i), []expr.Any{&expr.Counter{}})
	}
	c.Add("drops after some", []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}})
	return c
}

func (v verdicts) Elements(func(string, Element)) {}

type server byte

func serverAddr(n byte) string { return string([]byte{192, 0, 2, n}) }

func (server) Chain() *Chain { return nil }

func (s server) Elements(yield func(string, Element)) {
	yield("servers", Element{Key: serverAddr(byte(s))})
}

var podLayout = Layout[int, pod]{
	Owner: func(_ *Set, key string) (int, bool) {
		if len(key) != 4 {
			return 0, false
		}
		return int(key[2])<<8 | int(key[3]), true
	},
	Decode: func(sets map[string][]Element) (map[string][]Element, map[int]pod, bool) {
		parts := map[int]pod{}
		for _, e := range sets["pods"] {
			n := int(e.Key[2])<<8 | int(e.Key[3])
			p := pod{number: n}
			if _, err := fmt.Sscanf(e.Comment, "rules %d", &p.rules); err != nil {
				return nil, nil, false
			}
			p.chain, _ = strconv.Atoi(strings.TrimPrefix(e.Value, "from_"))
			parts[n] = p
		}
		for _, e := range sets["meets"] {
			n := int(e.Key[2])<<8 | int(e.Key[3])
			p, found := parts[n]
			if !found {
				return nil, nil, false
			}
			p.server = e.Value[3]
			parts[n] = p
		}
		return map[string][]Element{"ranges": sets["ranges"]}, parts, true
	},
}

func podTable(ranges ...string) Table {
	forward := Hooked("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter)
	forward.Add("goes by the pod", []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Lookup{SourceRegister: 1, DestRegister: 0, IsDestRegSet: true, SetName: "pods"}})
	t := Table{Name: "test-pods", Chains: []Chain{forward}, Elements: map[string][]Element{}, Sets: []*Set{
		{Name: "ranges", Comment: "of pods", Key: nftables.TypeIPAddr, Interval: true},
		{Name: "servers", Comment: "that somebody meets", Key: nftables.TypeIPAddr},
		{Name: "pods", Comment: "and their chains", Key: nftables.TypeIPAddr, Data: nftables.TypeVerdict, Parts: true},
		{Name: "meets", Comment: "whom", Key: nftables.TypeIPAddr, Data: nftables.TypeIPAddr, Parts: true},
	}}
	for _, r := range ranges {
		t.Elements["ranges"] = append(t.Elements["ranges"], OfPrefix(netip.MustParsePrefix(r)))
	}
	Sort(t.Elements["ranges"])
	return t
}

func pods(list ...pod) map[int]pod {
	all := map[int]pod{}
	for _, p := range list {
		all[p.number] = p
	}
	return all
}

// podsIn checks that the kernel holds the table with these pods, as somebody reads it who knows nothing.
func podsIn(t *testing.T, k Kernel, table Table, want map[int]pod) {
	t.Helper()
	elements, have, found, err := New(k, podLayout).Read(table)
	if err != nil || !found || !maps.Equal(have, want) || !slices.Equal(elements["ranges"], table.Elements["ranges"]) {
		t.Fatalf("the kernel holds %v, %v (found %t, %v), want %v, %v", have, elements, found, err, want, table.Elements)
	}
}

func TestHeld(t *testing.T) {
	kernels(t, func(t *testing.T, k Kernel) {
		h := New(k, podLayout)
		set := func(table Table, parts map[int]pod, want diff.Count) {
			t.Helper()
			for _, want := range []diff.Count{want, {}} {
				if got, err := h.Set(table, maps.All(parts)); err != nil || got != want {
					t.Fatalf("changed %+v, %v, want %+v", got, err, want)
				}
			}
			podsIn(t, k, table, parts)
			if same, err := h.Holds(t.Context()); err != nil || !same {
				t.Fatalf("holds: %t, %v", same, err)
			}
		}
		chain := func(n int) bool {
			has, err := k.HasChains("test-pods", append(slices.Clone(podTable().Chains), *verdicts{shared: 1}.Chain(), *verdicts{shared: n}.Chain()))
			testenv.Must(t, err)
			return has
		}
		table, all := podTable("10.0.0.0/24"), pods(pod{1, 1, 7, 0}, pod{2, 1, 7, 0}, pod{3, 2, 0, 0})
		if err := h.Change(nil); err == nil {
			t.Error("a table that was not set is changed")
		}
		set(table, all, diff.Count{Added: 1})
		generation, err := k.Generation()
		testenv.Must(t, err)
		if got, err := New(k, podLayout).Set(table, maps.All(all)); err != nil || got != (diff.Count{}) {
			t.Errorf("who starts anew changes %+v, %v", got, err)
		}
		if now, err := k.Generation(); err != nil || now != generation {
			t.Errorf("who starts anew touches what is right: %d, %v", now, err)
		}

		// The range becomes two, of which one is new; the last pod of a chain leaves it; nobody meets the server.
		set(podTable("10.0.0.0/25", "10.0.2.0/24"), pods(pod{1, 1, 0, 0}, pod{2, 1, 0, 0}, pod{3, 3, 0, 0}), diff.Count{Added: 2 + 1, Removed: 1 + 1 + 3})
		if !chain(3) || chain(2) {
			t.Error("the chains are not those of the pods")
		}
		set(table, all, diff.Count{Added: 1 + 1 + 3, Removed: 2 + 1})

		change := func(old, now pod) []Change[int, pod] {
			return []Change[int, pod]{{Key: old.number, Old: &old, New: &now}}
		}
		testenv.Must(t, h.Change(change(pod{2, 1, 7, 0}, pod{2, 1, 8, 0})))
		testenv.Must(t, h.Change(append(change(pod{1, 1, 7, 0}, pod{1, 1, 0, 0}), change(pod{3, 2, 0, 0}, pod{3, 3, 7, 0})...)))
		all = pods(pod{1, 1, 0, 0}, pod{2, 1, 8, 0}, pod{3, 3, 7, 0})
		podsIn(t, k, table, all)
		if !chain(3) || chain(2) {
			t.Error("the chains are not those of the pods after a change")
		}
		// A chain of the pod's own, and then with other rules.
		for _, now := range []pod{{1, 0, 0, 1}, {1, 0, 0, 2}, {1, 0, 8, 0}, {1, 1, 0, 0}} {
			testenv.Must(t, h.Change(change(all[1], now)))
			all[1] = now
			podsIn(t, k, table, all)
		}
		if err := h.Change(change(pod{1, 1, 7, 0}, pod{1, 1, 9, 0})); err == nil {
			t.Error("what is not there is taken away")
		}
		if err := h.Change(nil); err == nil {
			t.Error("a change goes on after one that failed")
		}
		set(table, all, diff.Count{})

		for what, tc := range map[string]struct {
			x    Transaction
			want diff.Count
		}{
			"an element of no part": {Transaction{Add: []Elements{{table.Sets[1], []Element{{Key: serverAddr(99)}}}}}, diff.Count{Added: 1}},
			"an interval":           {Transaction{Add: []Elements{{table.Sets[0], []Element{{Key: "\x0a\x00\x01\x03", KeyEnd: "\x0a\x00\x01\x09"}}}}}, diff.Count{Removed: 1}},
			"an interval is gone":   {Transaction{Remove: []Elements{{table.Sets[0], table.Elements["ranges"]}}}, diff.Count{Added: 1}},
			"a part more":           {Transaction{Add: []Elements{{table.Sets[2], []Element{{Key: podAddr(9), Verdict: true, Code: expr.VerdictGoto, Value: "from_1", Comment: "rules 0"}}}}}, diff.Count{Removed: 1}},
			"half a part":           {Transaction{Remove: []Elements{{table.Sets[2], []Element{{Key: podAddr(2)}}}}}, diff.Count{Added: 1}},
			"a chain more":          {Transaction{Chains: []Chain{{Name: "more"}}}, diff.Count{Added: 1}},
			"no table":              {Transaction{Delete: true}, diff.Count{Added: 1}},
			"another rule":          {Transaction{Delete: true, Make: &Table{Sets: table.Sets, Chains: []Chain{{Name: "forward"}}}}, diff.Count{Added: 1}},
		} {
			tc.x.Table = table.Name
			testenv.Must(t, k.Commit(tc.x))
			if same, err := h.Holds(t.Context()); err != nil || same {
				t.Errorf("%s: a comparison finds nothing, %v", what, err)
			}
			set(table, all, tc.want)
		}
		for range 2 {
			testenv.Must(t, h.Delete(table.Name))
		}
		if _, _, found, err := h.Read(table); err != nil || found {
			t.Errorf("a table that is gone: found %t, %v", found, err)
		}
	})
}

// A transaction that fails changes nothing.
func TestTransactions(t *testing.T) {
	kernels(t, func(t *testing.T, k Kernel) {
		table := podTable("10.0.0.0/24")
		all := pods(pod{1, 1, 7, 0}, pod{2, 2, 8, 0})
		h := New(k, podLayout)
		_, err := h.Set(table, maps.All(all))
		testenv.Must(t, err)
		ranges, servers, to := table.Sets[0], table.Sets[1], table.Sets[2]
		good := []Elements{{servers, []Element{{Key: serverAddr(50)}}}}
		before, err := k.Generation()
		testenv.Must(t, err)
		for what, x := range map[string]Transaction{
			"an element that is there":     {Add: append(good, Elements{servers, []Element{{Key: serverAddr(7)}}})},
			"an element that is not there": {Add: good, Remove: []Elements{{servers, []Element{{Key: serverAddr(9)}}}}},
			"an interval within another":   {Add: append(good, Elements{ranges, []Element{OfPrefix(netip.MustParsePrefix("10.0.0.8/29"))}})},
			"a verdict to no chain":        {Add: append(good, Elements{to, []Element{{Key: podAddr(3), Verdict: true, Code: expr.VerdictGoto, Value: "none"}}})},
			"a chain that is there":        {Add: good, Chains: []Chain{{Name: "from_1"}}},
			"a chain that pods go to":      {Add: good, Gone: []string{"from_1"}},
			"a chain that is not there":    {Add: good, Gone: []string{"from_9"}},
			"another table":                {Table: "none", Add: good},
		} {
			if x.Table == "" {
				x.Table = table.Name
			}
			if err := k.Commit(x); err == nil {
				t.Errorf("%s is accepted", what)
			}
		}
		if after, err := k.Generation(); err != nil || after != before {
			t.Errorf("the generation went from %d to %d, %v", before, after, err)
		}
		podsIn(t, k, table, all)
	})
}

// However it came about, by changes or at once, the kernel holds the same, and comparisons meanwhile find no difference.
func TestHeldAtRandom(t *testing.T) {
	kernels(t, func(t *testing.T, k Kernel) {
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		h := New(k, podLayout)
		table, now := podTable(), map[int]pod{}
		_, err := h.Set(table, maps.All(now))
		testenv.Must(t, err)
		stop, ended := make(chan struct{}), sync.WaitGroup{}
		ended.Go(func() {
			for {
				if same, err := h.Holds(t.Context()); err != nil || !same {
					t.Errorf("a comparison meanwhile: %t, %v", same, err)
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
		for range 200 {
			var changes []Change[int, pod]
			next := maps.Clone(now)
			for _, n := range rng.Perm(40)[:1+rng.IntN(4)] {
				c := Change[int, pod]{Key: n}
				if old, found := now[n]; found {
					c.Old = &old
				}
				if delete(next, n); rng.IntN(4) > 0 {
					c.New = &pod{n, rng.IntN(4), byte(rng.IntN(5)), rng.IntN(3)}
					next[n] = *c.New
				}
				if c.Old != nil || c.New != nil {
					changes = append(changes, c)
				}
			}
			now = next
			if rng.IntN(4) > 0 {
				testenv.Must(t, h.Change(changes))
			} else if got, err := h.Set(table, maps.All(now)); err != nil {
				t.Fatalf("set: %+v, %v", got, err)
			}
			podsIn(t, k, table, now)
		}
		close(stop)
		ended.Wait()
	})
}

// The kernel takes what nft prints of the table, and it is the same to us.
func TestTableAsNftHasIt(t *testing.T) {
	n, path := linktest.NamespaceAt(t)
	c, err := Open(path)
	testenv.Must(t, err)
	defer c.Close()
	h := New(c, podLayout)
	table, all := podTable("10.0.0.0/24", "10.0.2.0/23", "255.255.255.0/24"), pods(pod{1, 1, 7, 0}, pod{2, 2, 8, 0})
	_, err = h.Set(table, maps.All(all))
	testenv.Must(t, err)
	file := t.TempDir() + "/table.nft"
	testenv.Must(t, os.WriteFile(file, []byte(linktest.Run(t, n, "nft", "list", "table", "inet", table.Name)), 0o644))
	testenv.Must(t, h.Delete(table.Name))
	linktest.Run(t, n, "nft", "-f", file)
	if got, err := h.Set(table, maps.All(all)); err != nil || got != (diff.Count{}) {
		t.Errorf("changed %+v, %v", got, err)
	}
}
