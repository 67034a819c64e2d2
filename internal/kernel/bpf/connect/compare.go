package connect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Holds reports whether the kernel still holds what Set and Change left there. One goroutine may call it concurrently with them,
// and it delays them only briefly: it reads the maps in portions without a lock, then looks up again under the lock each entry
// that differed, since a concurrent change may be the reason.
func (t *Translator) Holds(ctx context.Context) (bool, error) {
	attached, err := t.attached()
	if err != nil {
		return false, err
	}
	for _, h := range hooks {
		if attached[h.name] != thisVersion {
			return false, nil
		}
	}
	cookie, err := t.nodeCookie()
	if err != nil {
		return false, err
	}
	var have, last uint64
	if err := t.objects.FathomNode.Lookup(nodeNetns, &have); err != nil || have != cookie {
		return false, nil // Set returns the error
	}
	if !t.held(func(s *state) {
		if err = t.objects.FathomNode.Lookup(nodeLastSet, &last); err == nil && uint32(last) != s.written {
			err = errDiffers
		}
	}) {
		return false, nil
	}
	if err == nil {
		err = t.compareServices(ctx)
	}
	if err == nil {
		err = t.compareBackends(ctx)
	}
	if errors.Is(err, errDiffers) {
		return false, nil
	}
	return err == nil, err
}

// errDiffers says that the maps differ from the state.
var errDiffers = errors.New("the maps are not as they should be")

// held calls f with the state under the lock. It returns false if the state is unknown.
func (t *Translator) held(f func(*state)) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.state == nil {
		return false
	}
	f(t.state)
	return true
}

func (t *Translator) compareServices(ctx context.Context) error {
	return compare(ctx, t, t.objects.FathomServices, pin.Services,
		func(s *state) map[frontendKey]serviceValue { return s.services },
		func(k frontendKey, _ serviceValue, yield func(frontendKey)) { yield(k) },
		func(s *state, k frontendKey) (serviceValue, bool) {
			v, there := s.services[k]
			return v, there
		})
}

func (t *Translator) compareBackends(ctx context.Context) error {
	return compare(ctx, t, t.objects.FathomBackends, pin.Backends,
		func(s *state) map[uint32]*endpointSet { return s.sets },
		func(number uint32, set *endpointSet, yield func(slotKey)) {
			for i := range set.slots {
				yield(slotKey{number, i})
			}
		},
		func(s *state, k slotKey) (endpoint, bool) {
			set, there := s.sets[k.Set]
			if !there || int(k.Number) >= len(set.content)/20 {
				return endpoint{}, false
			}
			return endpointAt(set.content, int(k.Number)), true
		})
}

// comparePortion is how many entries are compared under one lock.
const comparePortion = 1024

// compare compares a map with the state, whose keys come in groups; want returns the value of a key. The error is errDiffers
// if the map differs or the state is unknown.
func compare[K, V, G comparable, T any](ctx context.Context, t *Translator, m *ebpf.Map, name string,
	groups func(*state) map[G]T, each func(G, T, func(K)), want func(*state, K) (V, bool)) error {
	var doubts []K // keys that differed at the first look
	seen := make(map[K]struct{}, m.MaxEntries()/16)
	known := true
	err := readPortions(m, comparePortion, func(keys []K, values []V) error {
		for _, k := range keys {
			seen[k] = struct{}{}
		}
		known = known && t.held(func(s *state) {
			for i, k := range keys {
				if v, there := want(s, k); !there || v != values[i] {
					doubts = append(doubts, k)
				}
			}
		})
		return ctx.Err()
	})
	if err != nil {
		return fmt.Errorf("read the map %s: %w", name, err)
	}
	var all []G
	known = known && t.held(func(s *state) {
		all = slices.AppendSeq(make([]G, 0, len(groups(s))), maps.Keys(groups(s)))
	})
	for portion := range slices.Chunk(all, comparePortion) {
		known = known && t.held(func(s *state) {
			for _, g := range portion {
				if t, there := groups(s)[g]; there {
					each(g, t, func(k K) {
						if _, found := seen[k]; !found {
							doubts = append(doubts, k)
						}
					})
				}
			}
		})
	}
	for _, k := range doubts {
		known = known && t.held(func(s *state) {
			var have V
			v, wanted := want(s, k)
			lookup := m.Lookup(k, &have)
			switch {
			case lookup != nil && !errors.Is(lookup, ebpf.ErrKeyNotExist):
				err = fmt.Errorf("read the map %s: %w", name, lookup)
			case wanted != (lookup == nil), wanted && have != v:
				err = errDiffers
			}
		})
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
	if !known {
		return errDiffers // or the state is unknown: either way the next call is Set
	}
	return nil
}
