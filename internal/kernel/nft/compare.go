package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
)

// comparePortion is how many parts are looked at while changes wait: about a millisecond's.
const comparePortion = 256

// Holds says whether the kernel holds what Set and Change left there. Unlike the others it may be called beside them, by one
// goroutine, and makes them wait for a moment at most: to read a hundred thousand elements takes the kernel a second.
// What a change meets half-way seems to differ, and the kernel then lists some elements twice and others not at all. So
// whatever seems to differ is asked for again by its key, while changes wait.
func (h *Held[K, V]) Holds(ctx context.Context) (bool, error) {
	by, err := h.kernel.Beside()
	if err != nil {
		return false, err
	}
	defer by.Close()
	c := comparison[K, V]{Held: h, by: by, seed: maphash.MakeSeed()}
	same, err := c.run(ctx)
	if err != nil {
		return false, fmt.Errorf("compare nftables table inet %s: %w", c.of.Name, errors.Join(ctx.Err(), err))
	}
	return same, nil
}

// comparison is one of the kernel with what is known, which is looked at only while changes wait.
type comparison[K comparable, V Part[V]] struct {
	*Held[K, V]
	by   Kernel // by which the kernel is read
	of   Table
	seed maphash.Seed
}

// held calls f with what is known, while changes wait, and says whether something is.
func (c *comparison[K, V]) held(f func(*content[K, V])) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil || c.of.Name != "" && c.table.Variant != c.of.Variant {
		return false
	}
	f(c.known)
	return true
}

func (c *comparison[K, V]) run(ctx context.Context) (same bool, err error) {
	if !c.held(func(*content[K, V]) { c.of = c.table }) {
		return false, nil
	}
	before, err := c.by.Generation()
	if err != nil {
		return false, err
	}
	certain := false
	shared := map[Shared]int{}
	if !c.held(func(h *content[K, V]) {
		certain = c.generation == before // no transaction since, so it cannot have changed
		maps.Copy(shared, h.shared)
	}) || certain {
		return certain, nil
	}
	if same, err = c.shape(shared); err != nil {
		return false, err
	}
	if !same && (!c.held(func(h *content[K, V]) { same, err = c.shape(h.shared) }) || !same) {
		return false, err
	}
	parts, rest := map[K]uint64{}, map[string]uint64{}
	if err = c.eachOfParts(ctx, func(k K, set string, e Element) { parts[k] += c.digest(set, e) }); err == nil {
		err = c.eachOfRest(func(set string, e Element) { rest[set] += c.digest(set, e) })
	}
	if err != nil {
		return false, isNot(err)
	}
	doubts, ok := c.doubts(parts)
	if !ok {
		return false, nil
	}
	if len(doubts) > 0 {
		if same, err := c.lookAgain(ctx, doubts); !same {
			return false, err
		}
	}
	if same, err := c.compareRest(rest); !same {
		return false, err
	}
	if after, err := c.by.Generation(); err == nil && after == before {
		c.held(func(*content[K, V]) { c.generation = before })
	}
	return true, nil
}

// shape compares sets and chains.
func (c *comparison[K, V]) shape(shared map[Shared]int) (bool, error) {
	if same, err := c.by.HasSets(c.of); !same {
		return false, err
	}
	chains := slices.Clone(c.of.Chains)
	for s := range shared {
		if chain := s.Chain(); chain != nil {
			chains = append(chains, *chain)
		}
	}
	return c.by.HasChains(c.of.Name, chains)
}

// digest is a number for an element. Those of all elements of a part are added up: their order is the kernel's matter.
func (c *comparison[K, V]) digest(set string, e Element) uint64 {
	var h maphash.Hash
	h.SetSeed(c.seed)
	for _, s := range []string{set, e.Key, e.KeyEnd, e.Value, e.Comment} {
		_, _ = h.WriteString(s)
		_ = h.WriteByte(0xff)
	}
	var flags [5]byte
	binary.NativeEndian.PutUint32(flags[:], uint32(int32(e.Code)))
	if e.Verdict {
		flags[4] = 1
	}
	_, _ = h.Write(flags[:])
	return h.Sum64()
}

func (c *comparison[K, V]) eachOfParts(ctx context.Context, yield func(k K, set string, e Element)) error {
	for _, s := range c.of.Sets {
		if !s.Parts {
			continue
		}
		strange := false
		err := c.by.Each(c.of.Name, s, func(e Element) {
			k, ok := c.layout.Owner(s, e.Key)
			if strange = strange || !ok; ok && ctx.Err() == nil {
				yield(k, s.Name, e)
			}
		})
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		if strange {
			return errElements
		}
	}
	return nil
}

func (c *comparison[K, V]) eachOfRest(yield func(set string, e Element)) error {
	for _, s := range c.of.Sets {
		if s.Parts || s.Timeout {
			continue
		}
		if err := c.by.Each(c.of.Name, s, func(e Element) { yield(s.Name, e) }); err != nil {
			return err
		}
	}
	return nil
}

// doubts are the parts whose elements seem to differ from what is known. ok is false if nothing is known.
func (c *comparison[K, V]) doubts(have map[K]uint64) (list []K, ok bool) {
	var keys []K
	if !c.held(func(h *content[K, V]) {
		keys = slices.AppendSeq(make([]K, 0, len(h.parts)), maps.Keys(h.parts))
	}) {
		return nil, false
	}
	for portion := range slices.Chunk(keys, comparePortion) {
		ok := c.held(func(h *content[K, V]) {
			for _, k := range portion {
				part, found := h.parts[k]
				if !found {
					continue
				}
				want := uint64(0)
				part.Elements(func(set string, e Element) { want += c.digest(set, e) })
				if have[k] == want {
					delete(have, k)
				} else {
					have[k] = 0
				}
			}
		})
		if !ok {
			return nil, false
		}
	}
	return slices.Collect(maps.Keys(have)), true // what is left differs, or is no part's
}

// lookAgain says whether parts that seemed to differ do not.
func (c *comparison[K, V]) lookAgain(ctx context.Context, doubts []K) (same bool, err error) {
	// What is missing, or is another, is found at once.
	for _, k := range doubts {
		if same, err := c.sameNow(k, nil); !same || ctx.Err() != nil {
			return false, err
		}
	}
	// What is too much has to be listed.
	listed := make(map[K][]placed, len(doubts))
	for _, k := range doubts {
		listed[k] = nil
	}
	err = c.eachOfParts(ctx, func(k K, set string, e Element) {
		if list, doubted := listed[k]; doubted {
			listed[k] = append(list, placed{set, e})
		}
	})
	if err != nil {
		return false, isNot(err)
	}
	for k, list := range listed {
		if same, err := c.sameNow(k, list); !same || ctx.Err() != nil {
			return false, err
		}
	}
	return true, nil
}

// sameNow says whether the kernel has all elements of a part, and of others none but those.
func (c *comparison[K, V]) sameNow(k K, others []placed) (same bool, err error) {
	sets := make(map[string]*Set, len(c.of.Sets))
	for _, s := range c.of.Sets {
		sets[s.Name] = s
	}
	known := c.held(func(h *content[K, V]) {
		want := map[[2]string]Element{}
		if part, found := h.parts[k]; found {
			part.Elements(func(set string, e Element) { want[[2]string{set, e.Key}] = e })
		}
		check := func(p placed) {
			have, found, failed := c.by.Find(c.of.Name, sets[p.set], p.Element)
			e, wanted := want[[2]string{p.set, p.Key}]
			same, err = same && failed == nil && found == wanted && (!found || have == e), failed
		}
		same = true
		for at, e := range want {
			if same {
				check(placed{at[0], e})
			}
		}
		for _, p := range others {
			if _, wanted := want[[2]string{p.set, p.Key}]; same && !wanted {
				check(p)
			}
		}
	})
	return known && same, err
}

// compareRest compares the sets that are no part's, which are small: in doubt they are read again while changes wait.
func (c *comparison[K, V]) compareRest(have map[string]uint64) (same bool, err error) {
	compare := func(h *content[K, V]) {
		want := map[string]uint64{}
		add := func(set string, e Element) { want[set] += c.digest(set, e) }
		for set, list := range h.elements {
			for _, e := range list {
				add(set, e)
			}
		}
		for s := range h.shared {
			s.Elements(add)
		}
		same = maps.Equal(have, want)
	}
	if !c.held(compare) || same {
		return same, nil
	}
	c.held(func(h *content[K, V]) {
		have = map[string]uint64{}
		if err = c.eachOfRest(func(set string, e Element) { have[set] += c.digest(set, e) }); err == nil {
			compare(h)
		}
	})
	return same, isNot(err)
}
