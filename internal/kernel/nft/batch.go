package nft

import (
	"iter"
	"maps"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/diff"
)

// content is what a table holds. A batch changes it, together with the kernel.
type content[K comparable, V Part[V]] struct {
	elements map[string][]Element // those of no part, by set
	parts    map[K]V
	shared   map[Shared]int // and how often it is there
}

func newContent[K comparable, V Part[V]]() *content[K, V] {
	return &content[K, V]{parts: map[K]V{}, shared: map[Shared]int{}}
}

// batch collects changes and makes them: all at once, unless they are too many for one transaction. Then each transaction is of
// whole parts.
type batch[K comparable, V Part[V]] struct {
	kernel       Kernel // nil only collects
	table        Table
	have         *content[K, V]
	whole        bool // one transaction, whatever its size
	anew         bool // the table is made before
	count        diff.Count
	transactions uint32 // that were made

	take, drop func(Shared) // share by 1 and -1, and addTo, which are made once
	addOne     func(set string, e Element)

	remove, add map[string][]Element // by set
	size        int                  // bytes, about
	touched     map[Shared]int       // how often it was there before
}

// largeBytes is what goes into one transaction. The socket has room for more.
const largeBytes = sendBytes / 4

func newBatch[K comparable, V Part[V]](kernel Kernel, t Table, have *content[K, V]) *batch[K, V] {
	b := &batch[K, V]{kernel: kernel, table: t, have: have,
		remove: map[string][]Element{}, add: map[string][]Element{}, touched: map[Shared]int{}}
	b.take, b.drop, b.addOne = func(s Shared) { b.share(s, 1) }, func(s Shared) { b.share(s, -1) }, b.addTo
	return b
}

// become makes the table hold these elements and parts, and nothing else.
func (b *batch[K, V]) become(elements map[string][]Element, parts iter.Seq2[K, V]) error {
	for _, s := range b.table.Sets {
		want, have := elements[s.Name], b.have.elements[s.Name]
		d := diff.Delta[Element]{Add: want}
		if len(have) > 0 {
			d = diff.Compare(want, have, func(e Element) Element { return e })
		}
		for _, e := range d.Remove {
			b.removeFrom(s.Name, e)
		}
		for _, e := range d.Add {
			b.addTo(s.Name, e)
		}
	}
	b.have.elements = elements
	if parts == nil {
		parts = maps.All[map[K]V](nil)
	}
	wanted := map[K]bool{}
	for k := range parts {
		wanted[k] = true
	}
	for k := range b.have.parts {
		if !wanted[k] {
			var none V
			if err := b.change(k, none, false); err != nil {
				return err
			}
		}
	}
	for k, want := range parts {
		if have, found := b.have.parts[k]; found && have.Equal(want) {
			continue
		}
		if err := b.change(k, want, true); err != nil {
			return err
		}
	}
	return nil
}

// placed is an element and the set that it is in.
type placed struct {
	set string
	Element
}

// change makes a part what it is now, if it is.
func (b *batch[K, V]) change(k K, now V, is bool) error {
	old, found := b.have.parts[k]
	var was []placed
	only := now // what of it is to be looked at
	if found {
		old.Shares(b.drop)
		if a, can := any(old).(Apart[V]); can && is {
			old, only = a.Apart(now)
		}
		old.Elements(func(set string, e Element) { was = append(was, placed{set, e}) })
	}
	if !is {
		delete(b.have.parts, k)
		for _, p := range was {
			b.removeFrom(p.set, p.Element)
		}
		return b.flushIfLarge()
	}
	now.Shares(b.take)
	b.have.parts[k] = now
	if !found {
		now.Elements(b.addOne)
		return b.flushIfLarge()
	}
	left := make(map[[2]string]Element, len(was))
	for _, p := range was {
		left[[2]string{p.set, p.Key}] = p.Element
	}
	only.Elements(func(set string, e Element) {
		at := [2]string{set, e.Key}
		if have, found := left[at]; found && have == e {
			delete(left, at)
		} else {
			b.addTo(set, e)
		}
	})
	for at, e := range left {
		b.removeFrom(at[0], e)
	}
	return b.flushIfLarge()
}

func (b *batch[K, V]) share(s Shared, by int) {
	before := b.have.shared[s]
	if _, noted := b.touched[s]; !noted {
		b.touched[s] = before
	}
	if b.have.shared[s] = before + by; before+by == 0 {
		delete(b.have.shared, s)
	}
}

func (b *batch[K, V]) removeFrom(set string, e Element) {
	b.remove[set] = append(b.remove[set], e)
	b.size += len(e.Key) + len(e.KeyEnd) + 16
}

func (b *batch[K, V]) addTo(set string, e Element) {
	b.add[set] = append(b.add[set], e)
	b.size += len(e.Key) + len(e.KeyEnd) + len(e.Value) + len(e.Comment) + 32
}

// settle makes elements of what is shared, and tells which chains come, get other rules and go.
func (b *batch[K, V]) settle() (x Transaction) {
	come, gone := map[string]Chain{}, map[string]bool{}
	for s, before := range b.touched {
		chain := s.Chain()
		switch now := b.have.shared[s]; {
		case before == 0 && now > 0:
			if chain != nil {
				come[chain.Name] = *chain
			}
			s.Elements(b.addTo)
		case before > 0 && now == 0:
			if chain != nil {
				gone[chain.Name] = true
			}
			s.Elements(b.removeFrom)
		}
	}
	b.touched = map[Shared]int{}
	for _, name := range slices.Sorted(maps.Keys(come)) {
		if gone[name] { // the same chain with other rules
			x.Filled = append(x.Filled, come[name])
			delete(gone, name)
		} else {
			x.Chains = append(x.Chains, come[name])
		}
	}
	x.Gone = slices.Sorted(maps.Keys(gone))
	return x
}

func (b *batch[K, V]) flushIfLarge() error {
	if b.kernel == nil || b.whole || b.size < largeBytes {
		return nil
	}
	return b.flush()
}

// flush makes the changes that were collected.
func (b *batch[K, V]) flush() error {
	x := b.settle()
	x.Table = b.table.Name
	if b.anew {
		x.Delete, x.Make = true, &b.table
	}
	for _, s := range b.table.Sets {
		if list := b.remove[s.Name]; len(list) > 0 {
			x.Remove = append(x.Remove, Elements{s, list})
			b.count.Removed += len(list)
		}
		if list := b.add[s.Name]; len(list) > 0 {
			x.Add = append(x.Add, Elements{s, list})
			b.count.Added += len(list)
		}
	}
	if !b.anew && len(x.Chains)+len(x.Filled)+len(x.Gone)+len(x.Remove)+len(x.Add) == 0 {
		return nil
	}
	if err := b.kernel.Commit(x); err != nil {
		return err
	}
	b.transactions++
	b.anew, b.remove, b.add, b.size = false, map[string][]Element{}, map[string][]Element{}, 0
	return nil
}
