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
	unused    map[uint32]bool // sets that have lost their last user, or have none yet
	last      uint32          // the number that was given to a set last, also if that one is gone
	written   uint32          // what the map pin.Node says of that
	// What was wanted when they were written.
	frontends map[service.Key]service.Frontend
	nodePorts []netip.Addr
}

// endpointSet is one set of endpoints.
type endpointSet struct {
	content string
	slots   uint32 // there may be one below this
	users   int    // frontends
}

// Set makes the kernel hold what the plan says, attaches the programs, and may be repeated. It reads what is there and
// says how much of it was changed.
func (t *Translator) Set(p service.Plan) (changed int, err error) {
	return t.SetAfter(p, func() error { return nil })
}

// SetAfter is Set beside somebody who does his part meanwhile: before sockets meet anything else than now, it calls done,
// which waits for him. If that returns an error, they do not. Most of the work comes before.
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
	// Programs come last: then the first socket that meets them meets all Services.
	count, attachErr := t.attach()
	if attachErr == nil {
		attachErr = t.unpinFormer()
	}
	return changed + count.Added + count.Corrected, errors.Join(err, attachErr)
}

// notDoneError is what keeps sockets from meeting anything else.
type notDoneError struct{ error }

// errUncertain says that what the maps hold is not known.
var errUncertain = errors.New("what the kernel balances at connect() is not certain: set all of it")

// Change makes the kernel hold what has changed of Services since the last Set or Change, and does not look at others.
// After an error all has to be Set.
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
					// Asked of all, not of the change: keys of two Services may meet at a node's address.
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

// apply changes the maps, and what is known of them. A frontend gets new endpoints in one write, after these are there
// under a number that no frontend has had; what no frontend has any more is deleted after that. The programs look whether
// their frontend still has the same number when they have read its endpoint. done is called before any frontend changes.
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
		// First, so that no number is ever given twice: a UDP socket may come with one that it had long ago.
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

// sweep deletes the sets that no frontend has.
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

// holds says whether a frontend has these endpoints.
func (s *state) holds(v serviceValue, inSet string) bool {
	if int(v.Count) != len(inSet)/20 {
		return false
	}
	set, there := s.sets[v.Set]
	return v.Count == 0 || there && set.content == inSet
}

// add gives a number to a set that is about to be written.
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
	if !there { // the one without endpoints, or one that somebody took away
		return
	}
	set.users += n
	if set.users == 0 {
		s.unused[number] = true
	}
}

// read reads the maps.
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
		if set.slots == uint32(n) { // else something is missing, and it has the content of no set
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
		s.last = max(s.last, v.Set) // somebody may have taken the set away
	}
	return s, nil
}

// updateAll writes many entries with one system call, where the kernel has that.
func updateAll[K, V any](m *ebpf.Map, keys []K, values []V) error {
	for len(keys) > 0 {
		n, err := m.BatchUpdate(keys, values, nil)
		if errors.Is(err, ebpf.ErrNotSupported) {
			n, err = 1, m.Update(keys[0], values[0], ebpf.UpdateAny)
		}
		if err != nil && n == 0 { // else it went some way: memory comes in portions
			return err
		}
		keys, values = keys[n:], values[n:]
	}
	return nil
}

// deleteAll deletes many entries with one system call; those that are not there are no error.
func deleteAll[K any](m *ebpf.Map, keys []K) error {
	for len(keys) > 0 {
		n, err := m.BatchDelete(keys, nil)
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			n, err = 1, bpf.IgnoreMissing(m.Delete(keys[0]))
		case errors.Is(err, ebpf.ErrKeyNotExist):
			n, err = n+1, nil // the kernel stops there
		}
		if err != nil && n == 0 {
			return err
		}
		keys = keys[n:]
	}
	return nil
}

// readAll reads all entries of a map, many with one system call.
func readAll[K, V any](m *ebpf.Map, each func(K, V)) error {
	return readPortions(m, 8192, func(keys []K, values []V) error {
		for i := range keys {
			each(keys[i], values[i])
		}
		return nil
	})
}

// readPortions does so, and hands over what one system call gave.
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
