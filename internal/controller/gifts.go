package controller

import (
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/vip"
)

// gifts are the addresses that writes may give to Services by now or soon, and that the watches do not show. A pass that
// decides otherwise cannot call back a write that is under way: until it is known what became of it, no other Service
// gets its addresses.
type gifts struct {
	mu    sync.Mutex
	turns map[string]int // by object: which write was asked for last
	given map[string]gift
}

// gift is what a write gives to a Service that has not changed since version. To one that has, it gives nothing.
type gift struct {
	version   string
	addresses []netip.Addr
}

func newGifts() *gifts { return &gifts{turns: map[string]int{}, given: map[string]gift{}} }

// supersede has writes of an object that have not begun give nothing, and returns the turn of the next.
func (g *gifts) supersede(object string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.turns[object]++
	return g.turns[object]
}

// begin notes that a write is made, unless another has been asked for since.
func (g *gifts) begin(object string, turn int, is gift) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.turns[object] != turn {
		return false
	}
	g.given[object] = is
	return true
}

// failed notes that a write has given nothing, and says whether another has been asked for since. One that succeeded, or
// that met a Service that has changed, is settled when the watches show that.
func (g *gifts) failed(object string, turn int) (superseded bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.given, object)
	return g.turns[object] != turn
}

// pending forgets what the watches show by now, and returns what they do not, by object.
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

// leaving are the addresses that Services have, or may get by a write that is under way, and that they are not to have.
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
