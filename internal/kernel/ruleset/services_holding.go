package ruleset

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// holding is what the table of Services holds. Whatever changes it says so to a writer.
type holding struct {
	frontends     map[service.Key]service.Frontend // as asHeld makes them
	nodePortAddrs []netip.Addr
	ownPods       []netip.Prefix
	targets       map[target]int     // the chains, and how many frontends' sides go there
	meets         map[netip.Addr]int // own endpoints, and how often they are there
}

func newHolding() *holding {
	return &holding{frontends: map[service.Key]service.Frontend{}, targets: map[target]int{}, meets: map[netip.Addr]int{}}
}

func (h *holding) plan() service.Plan {
	p := service.Plan{NodePortAddrs: h.nodePortAddrs, OwnPods: h.ownPods}
	for _, k := range slices.SortedFunc(maps.Keys(h.frontends), service.Key.Compare) {
		p.Frontends = append(p.Frontends, h.frontends[k])
	}
	return p
}

// become makes it hold what a plan says that AsHeld returned.
func (h *holding) become(p service.Plan, w *writer) error {
	if !slices.Equal(h.ownPods, p.OwnPods) {
		// Whose endpoints are own is decided anew for all, without a look at what they were.
		for a := range h.meets {
			w.meet(a, h.meets[a])
		}
		h.meets = map[netip.Addr]int{}
		for _, f := range h.frontends {
			h.eachOwn(f, p.OwnPods, func(a netip.Addr) { w.meet(a, 0); h.meets[a]++ })
		}
	}
	for _, family := range inet.Families {
		w.replace(named(ownPods, family), prefixElements(family, h.ownPods), prefixElements(family, p.OwnPods))
		w.replace(named(nodePortAddrs, family), addrElements(family, h.nodePortAddrs), addrElements(family, p.NodePortAddrs))
	}
	h.nodePortAddrs, h.ownPods = p.NodePortAddrs, p.OwnPods
	w.holding = h

	wanted := make(map[service.Key]bool, len(p.Frontends))
	for _, f := range p.Frontends {
		wanted[f.Key] = true
	}
	for _, k := range slices.SortedFunc(maps.Keys(h.frontends), service.Key.Compare) {
		if !wanted[k] {
			if err := h.change(k, nil, w); err != nil {
				return err
			}
		}
	}
	for i := range p.Frontends {
		f := &p.Frontends[i]
		if have, found := h.frontends[f.Key]; found && have.Equal(*f) {
			continue
		}
		if err := h.change(f.Key, f, w); err != nil {
			return err
		}
	}
	return nil
}

// eachRest hands over all elements that are no frontend's.
func (h *holding) eachRest(yield func(set string, e element)) {
	for _, family := range inet.Families {
		for _, e := range prefixElements(family, h.ownPods) {
			yield(named(ownPods, family), e)
		}
		for _, e := range addrElements(family, h.nodePortAddrs) {
			yield(named(nodePortAddrs, family), e)
		}
	}
	for a := range h.meets {
		yield(named(ownEndpoints, inet.FamilyOf(a)), meetElement(a))
	}
	for t := range h.targets {
		if t.seconds == 0 {
			yield(t.chains(), t.element())
		}
	}
}

// change makes a frontend what it is now, or nil.
func (h *holding) change(k service.Key, now *service.Frontend, w *writer) error {
	w.holding = h
	old, found := h.frontends[k]
	if found {
		h.count(old, -1, w)
	}
	var was []placed
	if found {
		eachElement(old, func(set string, e element) { was = append(was, placed{set, e}) })
	}
	delete(h.frontends, k)
	if now == nil {
		for _, p := range was {
			w.removeFrom(p.set, p.element)
		}
		return w.flushIfLarge()
	}
	h.count(*now, 1, w)
	h.frontends[k] = *now
	left := make(map[[2]string]element, len(was))
	for _, p := range was {
		left[[2]string{p.set, p.key}] = p.element
	}
	eachElement(*now, func(set string, e element) {
		at := [2]string{set, e.key}
		switch have, found := left[at]; {
		case found && have == e:
			delete(left, at)
		default:
			w.addTo(set, e)
		}
	})
	for at, e := range left {
		w.removeFrom(at[0], e)
	}
	return w.flushIfLarge()
}

type placed struct {
	set string
	element
}

// count counts the chains and own endpoints that a frontend has need of.
func (h *holding) count(f service.Frontend, by int, w *writer) {
	for _, s := range sides(f) {
		if s.count == 0 {
			continue
		}
		t := s.target
		w.target(t, h.targets[t])
		if h.targets[t] += by; h.targets[t] == 0 {
			delete(h.targets, t)
		}
	}
	h.eachOwn(f, h.ownPods, func(a netip.Addr) {
		w.meet(a, h.meets[a])
		if h.meets[a] += by; h.meets[a] == 0 {
			delete(h.meets, a)
		}
	})
}

// eachOwn hands over the addresses of endpoints that are the node's own pods, each as often as it is there.
func (h *holding) eachOwn(f service.Frontend, own []netip.Prefix, yield func(netip.Addr)) {
	for _, b := range []service.Backends{f.Inside, f.Outside} {
		for _, e := range b.Endpoints {
			if slices.ContainsFunc(own, func(p netip.Prefix) bool { return p.Contains(e.Addr()) }) {
				yield(e.Addr())
			}
		}
	}
}

// writer collects changes and makes them: all at once, unless they are too many for one transaction. Then each is a
// part in which every frontend is whole.
type writer struct {
	to           *socket // nil only collects
	whole        bool    // one transaction, whatever its size
	anew         bool    // the table is made before
	count        *diff.Count
	transactions uint32 // that were made

	holding     *holding
	remove, add map[string][]element // by set
	size        int                  // bytes, about
	targets     map[target]int       // those that were touched, and how often they were used before
	meets       map[netip.Addr]int
}

// largeBytes is what goes into one transaction. The socket has room for more.
const largeBytes = sendBytes / 4

func (w *writer) removeFrom(set string, e element) {
	if w.remove == nil {
		w.remove = map[string][]element{}
	}
	w.remove[set] = append(w.remove[set], e)
	w.size += len(e.key) + len(e.keyEnd) + 16
}

func (w *writer) addTo(set string, e element) {
	if w.add == nil {
		w.add = map[string][]element{}
	}
	w.add[set] = append(w.add[set], e)
	w.size += len(e.key) + len(e.keyEnd) + len(e.value) + len(e.comment) + 32
}

// replace changes what a set holds.
func (w *writer) replace(set string, have, want []element) {
	for _, e := range have {
		if !slices.Contains(want, e) {
			w.removeFrom(set, e)
		}
	}
	for _, e := range want {
		if !slices.Contains(have, e) {
			w.addTo(set, e)
		}
	}
}

// target and meet note how many there were of something before it changes.
func (w *writer) target(t target, before int) {
	if _, noted := w.targets[t]; !noted {
		if w.targets == nil {
			w.targets = map[target]int{}
		}
		w.targets[t] = before
	}
}

func (w *writer) meet(a netip.Addr, before int) {
	if _, noted := w.meets[a]; !noted {
		if w.meets == nil {
			w.meets = map[netip.Addr]int{}
		}
		w.meets[a] = before
	}
}

// settle makes elements of what was counted, and returns the chains that come and go.
func (w *writer) settle() (come, gone []target) {
	if w.add == nil {
		w.add = map[string][]element{}
	}
	for a, before := range w.meets {
		e := meetElement(a)
		set := named(ownEndpoints, inet.FamilyOf(a))
		switch now := w.holding.meets[a]; {
		case before == 0 && now > 0:
			w.addTo(set, e)
		case before > 0 && now == 0:
			w.removeFrom(set, e)
		}
	}
	for t, before := range w.targets {
		switch now := w.holding.targets[t]; {
		case before == 0 && now > 0:
			come = append(come, t)
			if t.seconds == 0 {
				w.addTo(t.chains(), t.element())
			}
		case before > 0 && now == 0:
			gone = append(gone, t)
			if t.seconds == 0 {
				w.removeFrom(t.chains(), t.element())
			}
		}
	}
	w.meets, w.targets = nil, nil
	byName := func(a, b target) int { return strings.Compare(a.name(), b.name()) }
	slices.SortFunc(come, byName)
	slices.SortFunc(gone, byName)
	return come, gone
}

func (w *writer) flushIfLarge() error {
	if w.to == nil || w.whole || w.size < largeBytes {
		return nil
	}
	return w.flush()
}

// flush makes the changes that were collected.
func (w *writer) flush() error {
	t := newTransaction(ServicesTable)
	if w.anew {
		if err := t.addServices(); err != nil {
			return err
		}
	}
	come, gone := w.settle()
	for _, c := range come {
		chain := c.chain()
		t.addChain(chain)
		if err := t.addRules(chain); err != nil {
			return err
		}
	}
	// All of it becomes true at once, so that what goes may go first: what comes may have its key.
	for _, s := range slices.Sorted(maps.Keys(w.remove)) {
		t.deleteElements(s, w.remove[s])
	}
	for _, s := range slices.Sorted(maps.Keys(w.add)) {
		t.addElements(s, w.add[s])
	}
	for _, g := range gone {
		t.deleteChain(g.name())
	}
	if t.empty() {
		return nil
	}
	if err := w.to.commit(t); err != nil {
		return err
	}
	if w.count != nil {
		for _, list := range w.add {
			w.count.Added += len(list)
		}
		for _, list := range w.remove {
			w.count.Removed += len(list)
		}
	}
	w.transactions++
	w.anew, w.remove, w.add, w.size = false, nil, nil, 0
	return nil
}

// addServices makes the table as it is without Services.
func (t *transaction) addServices() error {
	t.addTable()
	for i, s := range serviceSets() {
		t.addSet(s, i+1)
	}
	chains := serviceChains()
	for _, c := range chains {
		t.addChain(c)
	}
	for _, c := range chains {
		if err := t.addRules(c); err != nil {
			return err
		}
	}
	return nil
}
