package controller

import (
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/vip"
)

// gifts are the addresses that writes have assigned or may assign to Services, and that the watches do not show yet. A
// later pass that decides otherwise cannot recall a write under way: no other Service gets its addresses until the outcome
// of the write is known.
type gifts struct {
	mu    sync.Mutex
	turns map[string]int // by object: the number of the latest requested write
	given map[string]gift
}

// gift is what a write assigns to a Service with a resource version. If the Service has changed since, it assigns nothing.
type gift struct {
	version   string
	addresses []netip.Addr
}

func newGifts() *gifts { return &gifts{turns: map[string]int{}, given: map[string]gift{}} }

// supersede cancels writes of an object that have not started, and returns the number of the next write.
func (g *gifts) supersede(object string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.turns[object]++
	return g.turns[object]
}

// begin records that a write starts, unless another has been requested since. Then it returns false.
func (g *gifts) begin(object string, turn int, is gift) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.turns[object] != turn {
		return false
	}
	g.given[object] = is
	return true
}

// failed records that a write has assigned nothing, and reports whether another has been requested since. A write that
// succeeded or conflicted is settled when the watches show it.
func (g *gifts) failed(object string, turn int) (superseded bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.given, object)
	return g.turns[object] != turn
}

// pending drops what the watches show by now, and returns what they do not show yet, by object.
func (g *gifts) pending(services []*corev1.Service) map[string][]netip.Addr {
	g.mu.Lock()
	defer g.mu.Unlock()
	versions := map[string]string{}
	for _, s := range services {
		versions[serviceWrite(s)] = s.ResourceVersion
	}
	list := map[string][]netip.Addr{}
	for object := range g.turns {
		if _, found := versions[object]; !found {
			delete(g.turns, object)
		}
	}
	for object, is := range g.given {
		if versions[object] != is.version {
			delete(g.given, object)
			continue
		}
		list[object] = is.addresses
	}
	return list
}

// leaving returns the addresses that Services have, or may get by a write under way, and should not have.
func (a *allocator) leaving(all []*corev1.Service, assignments []vip.Assignment) map[netip.Addr]bool {
	want := map[string][]netip.Addr{}
	for _, x := range assignments {
		want["service/"+x.Service.String()] = x.Addresses
	}
	pending := a.gifts.pending(all)
	leaving := map[netip.Addr]bool{}
	for _, s := range all {
		if !vip.Ours(s) && !vip.Wrote(s) {
			continue
		}
		object := serviceWrite(s)
		for _, addr := range slices.Concat(addresses(s), pending[object]) {
			if !slices.Contains(want[object], addr) {
				leaving[addr] = true
			}
		}
	}
	return leaving
}
