package policy

import (
	"cmp"
	"maps"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// ruling is what a rule of Admin or of Baseline says of a peer.
type ruling struct {
	Grant
	tier Tier
}

// compileTiers works out what the policies of Admin and Baseline make of each peer. Which rule comes first is decided here, so that a kernel
// that looks a peer up finds one answer: that of an address of a pod by its identity, which knows the networks that it is in, and that of any
// other by the address.
func (m *Model) compileTiers(c *classState, k *Class) {
	k.Tiers = true
	ofPods := map[*identity][]ruling{}
	var spans []span
	var ofSpans []ruling
	for _, p := range c.policies {
		k.Policies = append(k.Policies, p.ID)
		for i, r := range p.Rules[c.direction] {
			fixed := fixedGrants(r, c)
			for j, s := range p.peers[c.direction][i] {
				rulings := func(list []Grant) (all []ruling) {
					for _, g := range list {
						g.Action, g.By = r.Action, Reason{ID: p.ID, Position: r.Peers[j].Position, Rule: r.Name}
						if c.audit && p.Tier == Baseline && g.Action == Accept {
							g.Action = Pass // which accepts it, too, by what audits and denies nothing
						}
						all = append(all, ruling{g, p.Tier})
					}
					return all
				}
				for id := range s.members {
					list := fixed
					if c.direction == Egress && !s.network.IsValid() {
						list = slices.Concat(list, namedGrants(r, id))
					}
					ofPods[id] = append(ofPods[id], rulings(list)...)
				}
				for _, addrs := range m.spansOf(s) {
					for _, g := range rulings(fixed) {
						spans, ofSpans = append(spans, addrs), append(ofSpans, g)
					}
				}
			}
		}
	}
	for _, id := range slices.SortedFunc(maps.Keys(ofPods), func(a, b *identity) int { return cmp.Compare(a.number, b.number) }) {
		if id.number == 0 {
			continue // there is no number left for it
		}
		for _, g := range resolve(ofPods[id]) {
			k.Allows = append(k.Allows, Allow{id.number, g})
		}
	}
	k.Blocks = cut(spans, func(of []int) []Grant {
		var list []ruling
		for _, i := range of {
			list = append(list, ofSpans[i])
		}
		return resolve(list)
	})
}

// spansOf are the addresses that a selector selects beside those of pods.
func (m *Model) spansOf(s *peers) (list []span) {
	switch {
	case s.network.IsValid():
		list = append(list, span{s.network.Addr(), inet.Last(s.network)})
	case s.nodes != nil:
		for _, n := range m.nodes {
			for _, a := range n.Addrs {
				if s.nodes.Matches(n.Labels) {
					list = append(list, span{a, a})
				}
			}
		}
	}
	return list
}

// protocols are those whose ports rules tell apart.
var protocols = []service.Protocol{service.TCP, service.UDP, service.SCTP}

// resolve works out what rulings, in the order in which they are asked, come to: one answer for each protocol and port, where there is any, and
// one, All, for whatever has no other.
func resolve(list []ruling) (all []Grant) {
	rest, isRest := first(list, func(g Grant) bool { return g.All })
	rest.All, rest.Protocol, rest.From, rest.To = true, 0, 0, 0
	if isRest {
		all = append(all, rest)
	}
	for _, protocol := range protocols {
		for _, g := range pieces(protocol, list) {
			is, found := first(list, func(r Grant) bool { return r.All || r.Protocol == protocol && r.From <= g.From && g.From <= r.To })
			if !found || isRest && is.Action == rest.Action && is.By == rest.By {
				continue
			}
			g.Action, g.By = is.Action, is.By
			if n := len(all) - 1; n >= 0 && all[n].Protocol == protocol && int(all[n].To)+1 == int(g.From) && all[n].Action == g.Action && all[n].By == g.By {
				all[n].To = g.To
				continue
			}
			all = append(all, g)
		}
	}
	return all
}

// pieces are ranges of all ports of a protocol, within which a list of rulings says the same of each.
func pieces(protocol service.Protocol, list []ruling) (all []Grant) {
	begins := []uint16{0}
	for _, r := range list {
		if !r.All && r.Protocol == protocol {
			if begins = append(begins, r.From); r.To < 1<<16-1 {
				begins = append(begins, r.To+1)
			}
		}
	}
	if len(begins) == 1 {
		return nil
	}
	slices.Sort(begins)
	begins = slices.Compact(begins)
	for i, from := range begins {
		to := uint16(1<<16 - 1)
		if i+1 < len(begins) {
			to = begins[i+1] - 1
		}
		all = append(all, Grant{Protocol: protocol, From: from, To: to})
	}
	return all
}

// first returns the ruling that decides about what a condition is for. A Pass skips what is left of its tier; if no other tier has anything to
// say, it is the answer.
func first(list []ruling, is func(Grant) bool) (g Grant, found bool) {
	var passed *ruling
	for i, r := range list {
		switch {
		case !is(r.Grant) || passed != nil && passed.tier == r.tier:
		case r.Action != Pass:
			return r.Grant, true
		default:
			passed = &list[i]
		}
	}
	if passed != nil {
		return passed.Grant, true
	}
	return g, false
}
