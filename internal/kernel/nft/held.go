package nft

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/fathom-network/fathom/internal/facts/diff"
)

// Part is what a table holds whole or not at all: a frontend of a Service, or a pod with what it may do.
type Part[V any] interface {
	// Equal says that the other one has the same elements, and shares the same.
	Equal(V) bool
	// Elements are the part's own, in sets that have Parts.
	Elements(yield func(set string, e Element))
	// Shares is what others may have, too. One thing may come several times.
	Shares(yield func(Shared))
}

// Apart is a Part that can tell what it holds and another one does not, and the other way round, without looking at all elements of both.
type Apart[V any] interface {
	Apart(V) (own, others V)
}

// Shared is a thing that several parts may have: it comes with the first, and goes with the last. Its type is comparable, and two
// that are equal are the same. Where one goes and another comes with a chain of the same name, the chain gets other rules.
type Shared interface {
	// Chain is made before the elements that go there, and deleted after them. It is nil if there is none.
	Chain() *Chain
	// Elements are of sets without Parts.
	Elements(yield func(set string, e Element))
}

// Layout says how parts are found in the kernel again.
type Layout[K comparable, V Part[V]] struct {
	// Owner returns whose an element of a set with Parts is. It is not ok if the key cannot be one's.
	Owner func(s *Set, key string) (k K, ok bool)
	// Decode makes parts of what the sets hold, and returns those elements that are no part's and not shared. It takes only what it
	// needs: whether the rest fits is seen by making elements of the parts.
	Decode func(sets map[string][]Element) (elements map[string][]Element, parts map[K]V, ok bool)
}

// Held is a table in the kernel, and what is known of it. Set, Change, Read and Delete are for one goroutine at a time;
// Holds may be called beside them by another.
type Held[K comparable, V Part[V]] struct {
	layout Layout[K, V]
	kernel Kernel

	mu         sync.Mutex
	table      Table          // as it was set, without elements
	known      *content[K, V] // nil if nothing is
	generation uint32         // of the kernel's whole rule set, at which it was certain
}

// New returns a table of which nothing is known yet.
func New[K comparable, V Part[V]](kernel Kernel, layout Layout[K, V]) *Held[K, V] {
	return &Held[K, V]{kernel: kernel, layout: layout}
}

// Plain is a table without parts.
type Plain = Held[none, none]

// NewPlain returns a table without parts, of which nothing is known yet.
func NewPlain(kernel Kernel) *Plain {
	return New(kernel, Layout[none, none]{
		Decode: func(sets map[string][]Element) (map[string][]Element, map[none]none, bool) { return sets, nil, true },
	})
}

type none struct{}

func (none) Equal(none) bool                { return true }
func (none) Elements(func(string, Element)) {}
func (none) Shares(func(Shared))            {}

// Set makes the kernel hold the table with these parts, and returns the number of elements that it changed: 1 for a table
// that was not there or is not as we make it, which is replaced.
func (h *Held[K, V]) Set(t Table, parts iter.Seq2[K, V]) (diff.Count, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	count, err := h.set(t, parts)
	if err != nil {
		h.known = nil
		return diff.Count{}, fmt.Errorf("set nftables table inet %s: %w", t.Name, err)
	}
	return count, nil
}

func (h *Held[K, V]) set(t Table, parts iter.Seq2[K, V]) (diff.Count, error) {
	have, before, err := h.read(t)
	if errors.Is(err, errStrange) {
		return diff.Count{Added: 1}, h.replace(t, parts)
	}
	if err != nil {
		return diff.Count{}, err
	}
	b := newBatch(h.kernel, t, have)
	if b.become(t.Elements, parts) != nil || b.flush() != nil {
		// Elements that somebody else added or took away meanwhile, or ones that only look like ours.
		return diff.Count{Added: 1}, h.replace(t, parts)
	}
	h.learn(t, have, before, b.transactions)
	return b.count, nil
}

// replace makes the table anew. Packets meet the old one or the new one; only a very large one comes in parts.
func (h *Held[K, V]) replace(t Table, parts iter.Seq2[K, V]) error {
	before, err := h.kernel.Generation()
	if err != nil {
		return err
	}
	have := newContent[K, V]()
	b := newBatch(h.kernel, t, have)
	b.anew = true
	if err := b.become(t.Elements, parts); err != nil {
		return err
	}
	if err := b.flush(); err != nil {
		return err
	}
	h.learn(t, have, before, b.transactions)
	return nil
}

// learn keeps in mind what the table holds, and that it is certain if only our transactions came since a generation.
func (h *Held[K, V]) learn(t Table, have *content[K, V], before, transactions uint32) {
	t.Elements = nil
	h.table, h.known, h.generation = t, have, 0 // which is never a rule set's that has a table
	if transactions == 0 {
		h.generation = before
	} else if after, err := h.kernel.Generation(); err == nil && after == before+transactions {
		h.generation = after
	}
}

// Change is what becomes of a part. Old is nil if there was none, and New if there is none any more.
type Change[K comparable, V Part[V]] struct {
	Key      K
	Old, New *V
}

// Change does what Set would, for a few parts, in one transaction: it reads nothing. If it fails, what the kernel holds is not
// what it was thought to, and Set is to be called.
func (h *Held[K, V]) Change(changes []Change[K, V]) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.known == nil {
		return errors.New("change an nftables table: it was not set before")
	}
	if err := h.change(changes); err != nil {
		h.known = nil
		return fmt.Errorf("change nftables table inet %s: %w", h.table.Name, err)
	}
	return nil
}

func (h *Held[K, V]) change(changes []Change[K, V]) error {
	before, err := h.kernel.Generation()
	if err != nil {
		return err
	}
	b := newBatch(h.kernel, h.table, h.known)
	b.whole = true
	for _, c := range changes {
		have, found := h.known.parts[c.Key]
		if found != (c.Old != nil) || found && !have.Equal(*c.Old) {
			return fmt.Errorf("%v is not what the change says", c.Key)
		}
		var now V
		if c.New != nil {
			now = *c.New
		}
		if err := b.change(c.Key, now, c.New != nil); err != nil {
			return err
		}
	}
	if err := b.flush(); err != nil {
		return err
	}
	if before == h.generation { // else it is as uncertain as before
		h.learn(h.table, h.known, before, b.transactions)
	}
	return nil
}

// Delete takes the table away. One that is not there is not an error.
func (h *Held[K, V]) Delete(name string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.known = nil
	if err := h.kernel.Commit(Transaction{Table: name, Delete: true}); err != nil {
		return fmt.Errorf("delete nftables table inet %s: %w", name, err)
	}
	return nil
}

// Read returns what the kernel holds of the table: the elements that are no part's, by the names of their sets, sorted, and the parts.
// They are to be read alone. A table that is not there, or is not as we make it, is not found.
func (h *Held[K, V]) Read(t Table) (elements map[string][]Element, parts map[K]V, found bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	have, _, err := h.read(t)
	if errors.Is(err, errStrange) {
		return nil, nil, false, nil
	}
	if err != nil {
		return nil, nil, false, fmt.Errorf("read nftables table inet %s: %w", t.Name, err)
	}
	return have.elements, have.parts, true, nil
}

// ReadSet returns what the kernel holds of one set, such as one that rules add to. A set that is not there is an empty one.
func (h *Held[K, V]) ReadSet(table string, s *Set) (list []Element, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := isNot(h.kernel.Each(table, s, func(e Element) { list = append(list, e) })); err != nil {
		return nil, fmt.Errorf("read nftables table inet %s: %w", table, err)
	}
	return list, nil
}

// errElements says that the elements of the table are not as we make them. A large map that the kernel is still making
// room for, after elements came to it, is listed with some of them twice and others not at all, and no generation tells.
var errElements = fmt.Errorf("%w: its elements do not fit together", errStrange)

// read returns what the table holds, and at which generation. The error is errStrange if it is not as we make it.
func (h *Held[K, V]) read(t Table) (*content[K, V], uint32, error) {
	const enough, doubts = 20, 2
	for try := range enough {
		before, err := h.kernel.Generation()
		if err != nil {
			return nil, 0, err
		}
		if h.known != nil && h.generation == before && h.table.Name == t.Name && h.table.Variant == t.Variant {
			return h.known, before, nil // no transaction since, so it cannot have changed
		}
		have, err := h.readOnce(t)
		after, genErr := h.kernel.Generation()
		switch {
		case genErr != nil:
			return nil, 0, genErr
		case before == after && (try >= doubts || !errors.Is(err, errElements)):
			return have, before, err
		}
	}
	return nil, 0, errors.New("read the table: others change the rule set all the time")
}

func (h *Held[K, V]) readOnce(t Table) (*content[K, V], error) {
	if err := strangeUnless(h.kernel.HasSets(t)); err != nil {
		return nil, err
	}
	sets := map[string][]Element{}
	for _, s := range t.Sets {
		if s.Timeout {
			continue // packets fill it
		}
		var list []Element
		if err := h.kernel.Each(t.Name, s, func(e Element) { list = append(list, e) }); err != nil {
			return nil, err
		}
		if !s.Parts {
			Sort(list)
		}
		sets[s.Name] = list
	}
	elements, parts, ok := h.layout.Decode(sets)
	if !ok {
		return nil, errElements
	}
	have := newContent[K, V]()
	all := newBatch(nil, t, have)
	if err := all.become(elements, maps.All(parts)); err != nil {
		return nil, errElements
	}
	chains := all.settle().Chains
	for name, list := range sets {
		if !sameElements(list, all.add[name]) {
			return nil, errElements
		}
	}
	return have, strangeUnless(h.kernel.HasChains(t.Name, slices.Concat(t.Chains, chains)))
}

func strangeUnless(ok bool, err error) error {
	if err == nil && !ok {
		return errStrange
	}
	return err
}

func sameElements(a, b []Element) bool {
	if len(a) != len(b) || slices.Equal(a, b) {
		return len(a) == len(b)
	}
	have := make(map[string]Element, len(a))
	for _, e := range a {
		have[e.Key] = e
	}
	for _, e := range b {
		if have[e.Key] != e {
			return false
		}
	}
	return true
}
