package nft

import (
	"maps"
	"reflect"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// Fake is a kernel in memory, for tests without root. It refuses what the kernel would: an element or chain that is there already, one that
// is to go and is not there, an interval that overlaps another, a verdict to no chain, the end of a chain that something goes to.
type Fake struct {
	mu         sync.Mutex
	generation uint32
	tables     map[string]fakeTable
}

type fakeTable struct {
	sets     map[string]*Set
	elements map[string]map[string]Element // by set and key
	chains   map[string]Chain
}

// NewFake returns a kernel without tables.
func NewFake() *Fake { return &Fake{generation: 1, tables: map[string]fakeTable{}} }

// Generation is the number of transactions.
func (f *Fake) Generation() (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.generation, nil
}

// Commit makes all changes, or none.
func (f *Fake) Commit(x Transaction) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	t, found := f.tables[x.Table]
	if x.Make != nil {
		if found && !x.Delete {
			return unix.EEXIST
		}
		t = fakeTable{sets: map[string]*Set{}, elements: map[string]map[string]Element{}, chains: map[string]Chain{}}
		for _, s := range x.Make.Sets {
			t.sets[s.Name], t.elements[s.Name] = s, map[string]Element{}
		}
		for _, c := range x.Make.Chains {
			t.chains[c.Name] = c
		}
	} else if x.Delete {
		delete(f.tables, x.Table)
		f.generation++
		return nil
	} else if !found {
		return unix.ENOENT
	} else {
		t = fakeTable{sets: t.sets, elements: maps.Clone(t.elements), chains: maps.Clone(t.chains)}
	}
	if err := t.change(x); err != nil {
		return err
	}
	f.tables[x.Table] = t
	f.generation++
	return nil
}

func (t fakeTable) change(x Transaction) error {
	for _, c := range x.Chains {
		if _, found := t.chains[c.Name]; found {
			return unix.EEXIST
		}
		t.chains[c.Name] = c
	}
	for _, c := range x.Filled {
		if _, found := t.chains[c.Name]; !found {
			return unix.ENOENT
		}
		t.chains[c.Name] = c
	}
	for _, s := range slices.Concat(x.Remove, x.Add) {
		if t.sets[s.Set.Name] == nil {
			return unix.ENOENT
		}
		t.elements[s.Set.Name] = maps.Clone(t.elements[s.Set.Name])
	}
	for _, s := range x.Remove {
		for _, e := range s.List {
			if have, found := t.elements[s.Set.Name][e.Key]; !found || have.KeyEnd != e.KeyEnd {
				return unix.ENOENT
			}
			delete(t.elements[s.Set.Name], e.Key)
		}
	}
	for _, s := range x.Add {
		for _, e := range s.List {
			if err := t.add(s.Set, e); err != nil {
				return err
			}
		}
	}
	for _, name := range x.Gone {
		if _, found := t.chains[name]; !found {
			return unix.ENOENT
		}
		for _, set := range t.elements {
			for _, e := range set {
				if e.Verdict && e.Value == name {
					return unix.EBUSY
				}
			}
		}
		delete(t.chains, name)
	}
	return nil
}

func (t fakeTable) add(s *Set, e Element) error {
	have := t.elements[s.Name]
	if _, found := have[e.Key]; found {
		return unix.EEXIST
	}
	if _, found := t.chains[e.Value]; e.Verdict && e.Value != "" && !found {
		return unix.ENOENT
	}
	if s.isPaired() {
		for _, other := range have {
			if e.Key <= other.KeyEnd && other.Key <= e.KeyEnd {
				return unix.EEXIST
			}
		}
	}
	have[e.Key] = e
	return nil
}

// HasSets compares all but the comments.
func (f *Fake) HasSets(table Table) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t, found := f.tables[table.Name]
	if !found || len(t.sets) != len(table.Sets) {
		return false, nil
	}
	for _, want := range table.Sets {
		have := t.sets[want.Name]
		if have == nil || have.flags() != want.flags() || have.Key.Name != want.Key.Name || have.Data.Name != want.Data.Name {
			return false, nil
		}
	}
	return true, nil
}

// HasChains compares chains and their rules.
func (f *Fake) HasChains(table string, chains []Chain) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	want := map[string]Chain{}
	for _, c := range chains {
		want[c.Name] = c
	}
	return maps.EqualFunc(f.tables[table].chains, want, func(a, b Chain) bool { return reflect.DeepEqual(a, b) }), nil
}

// Each hands over the elements of a set.
func (f *Fake) Each(table string, s *Set, yield func(Element)) error {
	f.mu.Lock()
	elements, found := f.tables[table].elements[s.Name] // which no transaction changes: it makes others
	f.mu.Unlock()
	if !found {
		return errStrange
	}
	for _, e := range elements {
		yield(e)
	}
	return nil
}

// Find looks for one element by its key.
func (f *Fake) Find(table string, s *Set, e Element) (Element, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	have, found := f.tables[table].elements[s.Name][e.Key]
	return have, found, nil
}

// Beside returns the same kernel.
func (f *Fake) Beside() (Kernel, error) { return f, nil }

// Close does nothing.
func (f *Fake) Close() {}
