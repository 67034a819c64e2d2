package service

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"unique"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// candidate is an endpoint with a port.
type candidate struct {
	at netip.AddrPort
	*Endpoint
}

// lastResort says whether an endpoint terminates and still serves. Such endpoints are used if none is ready.
func (c Condition) lastResort() bool { return !c.Ready && c.Serving && c.Terminating }

// candidates returns all endpoints of a Service's port, of one family, sorted and without duplicates. An endpoint that moves
// from one slice to another is in both for a moment, and a new pod may have the address of a deleted one. Of duplicates, one
// that does not terminate takes precedence, then one that is ready, then the one of the first slice.
func candidates(own []*Slice, p Port, family inet.Family) []candidate {
	var n int
	for _, es := range own {
		n += len(es.Endpoints)
	}
	all := make([]candidate, 0, n)
	for _, es := range own {
		if es.Family != family {
			continue
		}
		for _, sp := range es.Ports {
			if sp.Name != p.ID || sp.Protocol != p.Protocol {
				continue
			}
			for i := range es.Endpoints {
				e := &es.Endpoints[i]
				all = append(all, candidate{netip.AddrPortFrom(e.Addr, sp.Number), e})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		return cmp.Or(a.at.Compare(b.at), falseFirst(a.Terminating, b.Terminating), falseFirst(!a.Ready, !b.Ready))
	})
	return slices.CompactFunc(all, func(a, b candidate) bool { return a.at == b.at })
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// choice is where a node sends traffic to a port, under each of the two policies.
type choice struct {
	cluster, local Backends
}

// choose computes a choice, and its part local only if a policy asks for it. Both parts use the ready endpoints or, if there are
// none, those that terminate and still serve. cluster takes them from all nodes, local from this node.
func choose(all []candidate, at place, local bool) choice {
	var c choice
	r := hinted(all, at)
	c.cluster.Endpoints = pick(all, func(e candidate) bool { return e.Ready && r.near(e, at) })
	if c.cluster.Endpoints == nil {
		c.cluster.Endpoints = pick(all, func(e candidate) bool { return e.lastResort() })
	}
	if !local {
		return c
	}
	c.local.Endpoints = pick(all, func(e candidate) bool { return e.Ready && at.holds(e.Endpoint) })
	if c.local.Endpoints == nil {
		c.local.Endpoints = pick(all, func(e candidate) bool { return e.lastResort() && at.holds(e.Endpoint) })
	}
	c.local.Drop = c.local.Endpoints == nil && c.cluster.Endpoints != nil
	return c
}

// pick returns the addresses of the candidates that want accepts, or nil if there are none.
func pick(all []candidate, want func(candidate) bool) []netip.AddrPort {
	n := 0
	for _, e := range all {
		if want(e) {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	picked := make([]netip.AddrPort, 0, n)
	for _, e := range all {
		if want(e) {
			picked = append(picked, e.at)
		}
	}
	return picked
}

// reach is how far away the endpoints for clients of a node may be.
type reach int

const (
	everywhere reach = iota
	withinZone
	withinNode
)

// hinted returns the reach that the endpoints' hints give to clients of a node. Hints are followed only if every ready endpoint
// has one, since otherwise the EndpointSlice controller has not finished, and only if one is for this node, since otherwise its
// clients would have no endpoint.
func hinted(all []candidate, at place) reach {
	everyNode, everyZone, node, zone := true, true, false, false
	for _, e := range all {
		if !e.Ready {
			continue
		}
		h := e.hinted()
		everyNode, everyZone = everyNode && h.Nodes != "", everyZone && h.Zones != ""
		node, zone = node || names(h.Nodes, at.name), zone || names(h.Zones, at.zone)
	}
	switch {
	case everyNode && node:
		return withinNode
	case everyZone && zone:
		return withinZone
	}
	return everywhere
}

// near says whether an endpoint is within reach.
func (r reach) near(e candidate, at place) bool {
	switch r {
	case withinNode:
		return names(e.hinted().Nodes, at.name)
	case withinZone:
		return names(e.hinted().Zones, at.zone)
	}
	return true
}

func (e *Endpoint) hinted() Hints {
	if e.Hints == (unique.Handle[Hints]{}) {
		return Hints{}
	}
	return e.Hints.Value()
}

// names says whether a list, separated by commas, has a word.
func names(list, word string) bool {
	if word == "" || list == word {
		return word != ""
	}
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}
