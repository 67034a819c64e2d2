package connect

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// state is what the maps hold.
type state struct {
	services  map[frontendKey]serviceValue
	sets      map[uint32]*endpointSet
	byContent map[string]uint32
	unused    map[uint32]bool // sets without a frontend: it was removed, or is not added yet
	last      uint32          // the number of the newest set, even if that one is deleted
	written   uint32          // the same, as the map pin.Node has it
	// The plan that the maps were written for.
	frontends map[service.Key]service.Frontend
	nodePorts []netip.Addr
}

// endpointSet is one set of endpoints.
type endpointSet struct {
	content string
	slots   uint32 // all slots are below this number
	users   int    // number of frontends that have this set
}

// Set makes the maps hold the plan and attaches the programs. It reads what the kernel holds, corrects it, and returns the
// number of corrections. It is idempotent.
func (t *Translator) Set(p service.Plan) (changed int, err error) {
	return t.SetAfter(p, func() error { return nil })
}

// SetAfter runs Set concurrently with another writer. It calls done before any frontend changes; done waits for the other
// writer. If done fails, no frontend changes. Most of the work is done before that call.
func (t *Translator) SetAfter(p service.Plan, done func() error) (changed int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state = nil
	s, err := t.read()
	if err != nil {
		return 0, err
	}
	renamed, err := t.setNode()
	if err != nil {
		return 0, err
	}
	if renamed {
		changed++
	}
	want := service.BalancedOf(p)
	unwanted := maps.Clone(s.services)
	for _, b := range want {
		delete(unwanted, keyOf(b.Key))
	}
	n, err := t.apply(s, want, slices.Collect(maps.Keys(unwanted)), done)
	changed += n
	var notDone *notDoneError
	if errors.As(err, &notDone) {
		return changed, notDone.error
	}
	if err == nil {
		s.frontends, s.nodePorts = service.ByKey(p.Frontends), slices.Clone(p.NodePortAddrs)
		t.state = s
	}
	// The programs are attached last, so that the first socket they see can reach every Service.
	count, attachErr := t.attach()
	if attachErr == nil {
		attachErr = t.unpinFormer()
	}
	return changed + count.Added + count.Corrected, errors.Join(err, attachErr)
}

// notDoneError is the error of the function done, after which no frontend was changed.
type notDoneError struct{ error }

// errUncertain says that the content of the maps is unknown.
var errUncertain = errors.New("what the kernel balances at connect() is not certain: set all of it")

// Change applies what changed of Services since the last Set or Change, and does not touch other Services. After an error the
// next call must be Set.
func (t *Translator) Change(changes []service.Change) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.state
	if s == nil {
		return errUncertain
	}
	for _, change := range changes {
		for _, f := range change.Old {
			delete(s.frontends, f.Key)
		}
	}
	for _, change := range changes {
		for _, f := range change.New {
			s.frontends[f.Key] = f
		}
	}
	var want []service.Balanced
	var gone []frontendKey
	seen := map[service.Key]bool{}
	for _, change := range changes {
		for _, frontends := range [][]service.Frontend{change.New, change.Old} {
			for _, f := range frontends {
				for _, k := range service.KeysAtConnect(f, s.nodePorts) {
					if seen[k] {
						continue
					}
					seen[k] = true
					// All frontends are asked, not only the changed ones: two Services may have the same key at a node's address.
					if b, found := service.BalancedAt(s.frontends, s.nodePorts, k); found {
						want = append(want, b)
					} else if _, there := s.services[keyOf(k)]; there {
						gone = append(gone, keyOf(k))
					}
				}
			}
		}
	}
	t.state = nil
	if _, err := t.apply(s, want, gone, func() error { return nil }); err != nil {
		return err
	}
	t.state = s
	return nil
}

// apply changes the maps and updates the state. It first writes new sets of endpoints, under numbers that were never used, then
// switches each frontend to its set in one write, then deletes the sets that no frontend has. The programs check after they
// have read an endpoint that the frontend still has the same set. apply calls done before it changes any frontend.
func (t *Translator) apply(s *state, want []service.Balanced, gone []frontendKey, done func() error) (changed int, err error) {
	var slots []slotKey
	var endpoints []endpoint
	var keys []frontendKey
	var values []serviceValue
	for _, b := range want {
		key, value, inSet := keyOf(b.Key), valueOf(b), content(b.Endpoints)
		have, there := s.services[key]
		if there && have.ID == value.ID && have.Affinity == value.Affinity && have.PodsOnly == value.PodsOnly && s.holds(have, inSet) {
			continue
		}
		if value.Count > 0 {
			number, there := s.byContent[inSet]
			if !there {
				number = s.add(inSet, value.Count)
				for i := range value.Count {
					slots = append(slots, slotKey{number, i})
					endpoints = append(endpoints, endpointAt(inSet, int(i)))
				}
			}
			value.Set = number
		}
		s.use(value.Set, 1)
		if there {
			s.use(have.Set, -1)
		}
		s.services[key] = value
		keys, values = append(keys, key), append(values, value)
	}
	if len(slots) > 0 {
		// The number is written first, so that none is ever used twice: a UDP socket may still refer to a set from long ago.
		if err := t.objects.FathomNode.Update(nodeLastSet, uint64(s.last), ebpf.UpdateAny); err != nil {
			return 0, fmt.Errorf("write the map %s: %w", pin.Node, err)
		}
		s.written = s.last
	}
	if err := updateAll(t.objects.FathomBackends, slots, endpoints); err != nil {
		return 0, fmt.Errorf("write the map %s: %w", pin.Backends, err)
	}
	if err := done(); err != nil {
		return 0, &notDoneError{err}
	}
	if err := updateAll(t.objects.FathomServices, keys, values); err != nil {
		return 0, fmt.Errorf("write the map %s: %w", pin.Services, err)
	}
	if err := deleteAll(t.objects.FathomServices, gone); err != nil {
		return len(keys), fmt.Errorf("delete from the map %s: %w", pin.Services, err)
	}
	for _, key := range gone {
		s.use(s.services[key].Set, -1)
		delete(s.services, key)
	}
	swept, err := t.sweep(s)
	return len(keys) + len(gone) + swept, err
}

// sweep deletes the sets that no frontend has, and returns how many there were.
func (t *Translator) sweep(s *state) (int, error) {
	var slots []slotKey
	n := 0
	for number := range s.unused {
		set := s.sets[number]
		if set.users > 0 {
			continue
		}
		for i := range set.slots {
			slots = append(slots, slotKey{number, i})
		}
		if s.byContent[set.content] == number {
			delete(s.byContent, set.content)
		}
		delete(s.sets, number)
		n++
	}
	clear(s.unused)
	if err := deleteAll(t.objects.FathomBackends, slots); err != nil {
		return n, fmt.Errorf("delete from the map %s: %w", pin.Backends, err)
	}
	return n, nil
}

// holds reports whether a frontend has exactly these endpoints.
func (s *state) holds(v serviceValue, inSet string) bool {
	if int(v.Count) != len(inSet)/20 {
		return false
	}
	set, there := s.sets[v.Set]
	return v.Count == 0 || there && set.content == inSet
}

// add assigns an unused number to a set that is about to be written.
func (s *state) add(inSet string, slots uint32) uint32 {
	for {
		s.last++
		if _, there := s.sets[s.last]; s.last != 0 && !there {
			break
		}
	}
	s.sets[s.last] = &endpointSet{content: inSet, slots: slots}
	s.byContent[inSet] = s.last
	return s.last
}

func (s *state) use(number uint32, n int) {
	set, there := s.sets[number]
	if !there { // the empty set, or one that another process deleted
		return
	}
	set.users += n
	if set.users == 0 {
		s.unused[number] = true
	}
}

// read reads all maps into a new state.
func (t *Translator) read() (*state, error) {
	s := &state{services: map[frontendKey]serviceValue{}, sets: map[uint32]*endpointSet{}, byContent: map[string]uint32{}, unused: map[uint32]bool{}}
	if err := readAll(t.objects.FathomServices, func(k frontendKey, v serviceValue) { s.services[k] = v }); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Services, err)
	}
	type entry struct {
		slotKey
		endpoint
	}
	var backends []entry
	if err := readAll(t.objects.FathomBackends, func(k slotKey, v endpoint) { backends = append(backends, entry{k, v}) }); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Backends, err)
	}
	slices.SortFunc(backends, func(a, b entry) int {
		return cmp.Compare(uint64(a.Set)<<32|uint64(a.Number), uint64(b.Set)<<32|uint64(b.Number))
	})
	for len(backends) > 0 {
		number := backends[0].Set
		n := 1
		for n < len(backends) && backends[n].Set == number {
			n++
		}
		set := &endpointSet{slots: backends[n-1].Number + 1}
		if set.slots == uint32(n) { // otherwise slots are missing, and the set matches no content
			b := make([]byte, 0, 20*n)
			for _, e := range backends[:n] {
				b = e.appendTo(b)
			}
			set.content = string(b)
			s.byContent[set.content] = number
		}
		s.sets[number] = set
		s.unused[number] = true
		s.last = number
		backends = backends[n:]
	}
	var last uint64
	if err := t.objects.FathomNode.Lookup(nodeLastSet, &last); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Node, err)
	}
	s.last, s.written = max(s.last, uint32(last)), uint32(last)
	for _, v := range s.services {
		s.use(v.Set, 1)
		s.last = max(s.last, v.Set) // another process may have deleted the set
	}
	return s, nil
}

// updateAll writes many entries with one system call, if the kernel supports batches.
func updateAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for len(keys) > 0 {
		n, err := m.BatchUpdate(keys, values, nil)
		if errors.Is(err, ebpf.ErrNotSupported) {
			n, err = 1, m.Update(keys[0], values[0], ebpf.UpdateAny)
		}
		if err != nil && n == 0 { // a batch may fail half-way, since memory is allocated in portions
			return err
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

// deleteAll deletes many entries with one system call, if the kernel supports batches. Missing entries are not an error.
func deleteAll[K any](m *ebpf.Map, keys []K) error {
	for len(keys) > 0 {
		n, err := m.BatchDelete(keys, nil)
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			n, err = 1, bpf.IgnoreMissing(m.Delete(keys[0]))
		case errors.Is(err, ebpf.ErrKeyNotExist):
			n, err = n+1, nil // the kernel stops at the missing entry
		}
		if err != nil && n == 0 {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

// readAll calls each for every entry of a map. It reads many with one system call.
func readAll[K, V any](m *ebpf.Map, each func(K, V)) error {
	return readPortions(m, 8192, func(keys []K, values []V) error {
		for i := range keys {
			each(keys[i], values[i])
		}
		return nil
	})
}

// readPortions calls each with the entries that one system call returned.
func readPortions[K, V any](m *ebpf.Map, portion int, each func([]K, []V) error) error {
	keys, values := make([]K, portion), make([]V, portion)
	var at ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&at, keys, values, nil)
		if errors.Is(err, ebpf.ErrNotSupported) {
			break
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
		if wrong := each(keys[:n], values[:n]); wrong != nil {
			return wrong
		}
		if err != nil {
			return nil
		}
	}
	i := m.Iterate()
	for i.Next(&keys[0], &values[0]) {
		if err := each(keys[:1], values[:1]); err != nil {
			return err
		}
	}
	return i.Err()
}
