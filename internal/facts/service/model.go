package service

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Model holds all Services and EndpointSlices, and computes which frontends have changed since it was last asked. It takes little
// more memory than the frontends themselves. The cost of a change grows with the size of its Service only, whatever the number
// of Services. Model is not safe for concurrent use. The frontends that it returns share their slices with it, so callers must
// not modify them.
type Model struct {
	node     Node
	place    place
	services map[Name]*entry
	slices   map[Name]*entry // by the slice's own name
	health   map[*entry]HealthCheck
	// checks are what HealthChecks returned last; nil if health has changed since.
	checks   []HealthCheck
	wrong    map[*entry]struct{} // those with problems of their own
	balanced map[*entry]LoadBalanced
	// differs says that balanced has changed since LoadBalancers was last called.
	differs bool
	// tellsClusterIPs says that balanced includes ClusterIPs.
	tellsClusterIPs bool
	claims          claims
	left            departures
	// Which external IPs are served, and the addresses that no external IP may be.
	externalIPs ExternalIPs
	reserved    reservations
	holders     map[netip.Addr][]*entry // by ClusterIP and load balancer address
	askers      map[netip.Addr][]*entry // by external IP
	touched     []*entry                // those with an object that changed since update
	changed     []*entry                // those with frontends that changed since Changes
}

// entry is a Service, or the slices of one that does not exist yet or any more.
type entry struct {
	name    Name
	service *Service // nil if there are only slices
	slices  []*Slice // sorted by name
	claimed []Frontend
	refused map[netip.Addr]error // external IPs that are not served, with the reason
	rank    rank                 // the one with which claimed was registered
	given   []Frontend           // those of claimed that no other Service has
	told    []Frontend           // given at the last call of Changes

	// Whether the entry is in the lists of Model. Maps would be slower: one that was large once stays slow to walk.
	isTouched, isChanged bool
}

// NewModel returns an empty Model for a node.
func NewModel(node Node) *Model {
	return &Model{
		node:     node,
		place:    placeOf(node),
		services: map[Name]*entry{},
		slices:   map[Name]*entry{},
		health:   map[*entry]HealthCheck{},
		wrong:    map[*entry]struct{}{},
		balanced: map[*entry]LoadBalanced{},
		claims:   newClaims(),
		holders:  map[netip.Addr][]*entry{},
		askers:   map[netip.Addr][]*entry{},
	}
}

// SetNode sets the node, and recomputes all frontends if it differs.
func (m *Model) SetNode(node Node) {
	if node.Name != m.node.Name || node.Zone != m.node.Zone || !slices.Equal(node.Addrs, m.node.Addrs) {
		for _, e := range m.services {
			m.touch(e)
		}
	}
	m.node, m.place = node, placeOf(node)
}

// Node returns the node that frontends are worked out for.
func (m *Model) Node() Node { return m.node }

// SetService adds or replaces a Service. The model retains it.
func (m *Model) SetService(now *Service) {
	e := m.entry(now.Name)
	m.index(e, e.service, now)
	e.service = now
	m.touch(e)
}

// DeleteService removes a Service. Its slices stay until DeleteSlice removes them.
func (m *Model) DeleteService(name Name) {
	if e := m.services[name]; e != nil {
		m.index(e, e.service, nil)
		e.service = nil
		m.touch(e)
	}
}

// SetSlice adds or replaces an EndpointSlice, which may come before its Service. The model retains it.
func (m *Model) SetSlice(now *Slice) {
	if before := m.slices[now.Name]; before != nil && before.name != now.Of {
		m.DeleteSlice(now.Name)
	}
	if now.Of == (Name{}) {
		return
	}
	e := m.entry(now.Of)
	if i, found := e.find(now.Name.Name); found {
		m.left.note(e.slices[i], now)
		e.slices[i] = now
	} else {
		m.left.note(nil, now)
		e.slices = slices.Insert(e.slices, i, now)
	}
	m.slices[now.Name] = e
	m.touchSlices(e)
}

// DeleteSlice removes an EndpointSlice.
func (m *Model) DeleteSlice(name Name) {
	e := m.slices[name]
	if e == nil {
		return
	}
	if i, found := e.find(name.Name); found {
		m.left.note(e.slices[i], nil)
		e.slices = slices.Delete(e.slices, i, i+1)
	}
	delete(m.slices, name)
	m.touchSlices(e)
}

// touchSlices marks a Service whose slices changed for recomputation.
func (m *Model) touchSlices(e *entry) {
	m.touch(e)
	if e.name == apiServer {
		m.touchAskers()
	}
}

// Replace sets all Services and slices, and removes those that are not among them. It is for the result of a list, while the
// other methods are for the events of a watch.
func (m *Model) Replace(services []*Service, all []*Slice) {
	gone := map[Name]bool{}
	for name, e := range m.services {
		gone[name] = e.service != nil
	}
	for _, svc := range services {
		delete(gone, svc.Name)
		m.SetService(svc)
	}
	for name := range gone {
		m.DeleteService(name)
	}
	clear(gone)
	for name := range m.slices {
		gone[name] = true
	}
	for _, es := range all {
		delete(gone, es.Name)
		m.SetSlice(es)
	}
	for name := range gone {
		m.DeleteSlice(name)
	}
}

func (m *Model) entry(name Name) *entry {
	e := m.services[name]
	if e == nil {
		e = &entry{name: name}
		m.services[name] = e
	}
	return e
}

func (m *Model) touch(e *entry) {
	if !e.isTouched {
		e.isTouched, m.touched = true, append(m.touched, e)
	}
}

func (e *entry) find(name string) (int, bool) {
	return slices.BinarySearchFunc(e.slices, name, func(s *Slice, name string) int { return strings.Compare(s.Name.Name, name) })
}

// Changes returns the changes of frontends since the last call of Changes or Frontends, sorted by Service. Each key is in one
// change only: if it moves from one Service to another, the frontend of the first is among the old ones in the change of the
// second. So changes can be applied in any order, and no key is ever without a frontend in between.
func (m *Model) Changes() []Change {
	m.update()
	if len(m.changed) == 0 {
		return nil
	}
	var all []Change
	moved := map[Key]Frontend{} // to another Service
	for _, e := range m.changed {
		c := diff(e.name, e.told, e.given)
		c.Old = slices.DeleteFunc(c.Old, func(f Frontend) bool {
			owner := m.claims.owners[f.Key]
			if owner == nil || owner == e {
				return false
			}
			moved[f.Key] = f
			return true
		})
		all = append(all, c)
		m.tell(e)
	}
	clear(m.changed)
	m.changed = m.changed[:0]
	if len(moved) > 0 {
		for i := range all {
			c := &all[i]
			for _, f := range c.New {
				if old, ok := moved[f.Key]; ok {
					c.Old = append(c.Old, old)
				}
			}
			slices.SortFunc(c.Old, func(a, b Frontend) int { return a.Compare(b.Key) })
		}
	}
	all = slices.DeleteFunc(all, func(c Change) bool { return len(c.Old) == 0 && len(c.New) == 0 })
	slices.SortFunc(all, func(a, b Change) int { return a.Service.Compare(b.Service) })
	return all
}

// Frontends returns all frontends, sorted by keys. They include all changes so far, which Changes does not return again.
func (m *Model) Frontends() []Frontend {
	m.update()
	for _, e := range m.changed {
		m.tell(e)
	}
	clear(m.changed)
	m.changed = m.changed[:0]
	all := make([]Frontend, 0, len(m.claims.owners))
	for _, e := range m.services {
		all = append(all, e.given...)
	}
	slices.SortFunc(all, func(a, b Frontend) int { return a.Compare(b.Key) })
	return all
}

// Named returns the Services that have these IDs, sorted. An ID may have no Service, or several.
func (m *Model) Named(ids []uint32) []Name {
	var all []Name
	for name := range m.services {
		if slices.Contains(ids, ID(name)) {
			all = append(all, name)
		}
	}
	slices.SortFunc(all, Name.Compare)
	return all
}

// HealthChecks returns the health checks that the node answers, sorted by Service. Callers must not modify the list, which is
// shared until something changes.
func (m *Model) HealthChecks() []HealthCheck {
	m.update()
	if m.checks == nil {
		m.checks = slices.AppendSeq([]HealthCheck{}, maps.Values(m.health))
		slices.SortFunc(m.checks, func(a, b HealthCheck) int { return a.Service.Compare(b.Service) })
	}
	return m.checks
}

// Life says what is known of an endpoint of a Service.
func (m *Model) Life(name Name, endpoint netip.AddrPort) Life {
	var l Life
	if e := m.services[name]; e != nil {
		for _, s := range e.slices {
			if !slices.ContainsFunc(s.Ports, func(p SlicePort) bool { return p.Number == endpoint.Port() }) {
				continue
			}
			for i := range s.Endpoints {
				if x := &s.Endpoints[i]; x.Addr == endpoint.Addr() {
					l.Present, l.Serving = true, l.Serving || x.Serving
				}
			}
		}
	}
	l.Gone = !l.Present && m.left.has(endpoint.Addr())
	return l
}

// Departures returns how many endpoints' pods have gone so far. The proxy looks for flows to them whenever the number has grown.
func (m *Model) Departures() uint64 { return m.left.count }

// Problem is a reason why a part of a Service does not work as its object asks. The rest of the Service works.
type Problem struct {
	Service Name
	Text    string
	// Refused says that a setting of the cluster is the reason, so that the kernels hold what they should.
	Refused bool
}

func (p Problem) String() string { return fmt.Sprintf("Service %s: %s", p.Service, p.Text) }

// Problems returns the current problems of all Services, sorted by Service.
func (m *Model) Problems() []Problem {
	m.update()
	all := m.claims.problems()
	for e := range m.wrong {
		for _, text := range e.service.Problems {
			all = append(all, Problem{Service: e.name, Text: text})
		}
		for a, why := range e.refused {
			all = append(all, Problem{e.name, fmt.Sprintf("externalIPs: %s is not served: %v", a, why), true})
		}
	}
	slices.SortFunc(all, func(a, b Problem) int {
		if c := a.Service.Compare(b.Service); c != 0 {
			return c
		}
		return strings.Compare(a.Text, b.Text)
	})
	return all
}

// update recomputes the Services that were touched, and those that gain or lose a key to them.
func (m *Model) update() {
	if len(m.touched) == 0 {
		return
	}
	for _, e := range m.touched {
		m.recompute(e)
	}
	m.claims.settle(m.touch)
	for _, e := range m.touched {
		if given := m.claims.won(e); !slices.EqualFunc(given, e.given, Frontend.Equal) {
			e.given = given
			if !e.isChanged {
				e.isChanged, m.changed = true, append(m.changed, e)
			}
		} else if len(given) == len(e.claimed) {
			e.claimed = e.given // one copy is enough
		}
		e.isTouched = false
		m.forget(e)
	}
	clear(m.touched)
	m.touched = m.touched[:0]
}

func (m *Model) recompute(e *entry) {
	var claimed []Frontend
	r := e.rank
	e.refused = nil
	if e.service != nil {
		e.refused = m.external(e)
	}
	m.balance(e)
	m.check(e)
	if e.service != nil && len(e.service.Problems)+len(e.refused) > 0 {
		m.wrong[e] = struct{}{}
	} else {
		delete(m.wrong, e)
	}
	if e.service != nil {
		claimed = e.service.frontends(e.slices, m.place)
		claimed = slices.DeleteFunc(claimed, func(f Frontend) bool { return f.Kind == ExternalIP && e.refused[f.Addr] != nil })
		for i := range claimed {
			claimed[i].PodsOnly = claimed[i].Kind == ExternalIP && m.externalIPs.PodsOnly
		}
		r = rank{e.service.Created, e.name}
	}
	same := func(a, b Frontend) bool { return a.Key == b.Key && a.Kind == b.Kind }
	if r == e.rank && slices.EqualFunc(claimed, e.claimed, same) {
		e.claimed = claimed
		return
	}
	m.claims.release(e)
	e.claimed, e.rank = claimed, r
	m.claims.claim(e)
}

// check recomputes a Service's health check.
func (m *Model) check(e *entry) {
	before, had := m.health[e]
	var now HealthCheck
	has := false
	if e.service != nil {
		now, has = e.service.healthCheck(e.slices, m.place)
	}
	if has == had && now == before {
		return
	}
	m.checks = nil
	if has {
		m.health[e] = now
	} else {
		delete(m.health, e)
	}
}

// tell records that the caller has a Service's changes.
func (m *Model) tell(e *entry) {
	e.told, e.isChanged = e.given, false
	m.forget(e)
}

// forget removes the entry of a Service that is empty and has no changes left to return.
func (m *Model) forget(e *entry) {
	if !e.isChanged && e.service == nil && len(e.slices) == 0 && len(e.given) == 0 && len(e.told) == 0 {
		delete(m.services, e.name)
	}
}

// diff returns the difference of two lists that are sorted by keys.
func diff(name Name, old, now []Frontend) Change {
	c := Change{Service: name}
	for len(old) > 0 || len(now) > 0 {
		switch {
		case len(now) == 0 || len(old) > 0 && old[0].Compare(now[0].Key) < 0:
			c.Old, old = append(c.Old, old[0]), old[1:]
		case len(old) == 0 || old[0].Key != now[0].Key:
			c.New, now = append(c.New, now[0]), now[1:]
		default:
			if !old[0].Equal(now[0]) {
				c.Old, c.New = append(c.Old, old[0]), append(c.New, now[0])
			}
			old, now = old[1:], now[1:]
		}
	}
	return c
}
