package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// compile works out what a class allows.
func (m *Model) compile(c *classState) *Class {
	k := &Class{Number: c.number, Direction: c.direction}
	if c.number == closed {
		return k
	}
	if c.tiers {
		m.compileTiers(c, k)
		return k
	}
	grants := map[Number][]Grant{} // by peer
	var blocks []AllowBlock
	for _, p := range c.policies {
		k.Policies = append(k.Policies, p.ID)
		for i, r := range p.Rules[c.direction] {
			fixed := fixedGrants(r, c)
			if r.AnyPeer {
				grants[0] = append(grants[0], by(p.ID, r.Position, fixed)...)
			}
			for j, s := range p.peers[c.direction][i] {
				if s == nil {
					for _, span := range spans(r.Peers[j].Block) {
						for _, g := range by(p.ID, r.Peers[j].Position, fixed) {
							blocks = append(blocks, AllowBlock{span.first, span.last, g})
						}
					}
					continue
				}
				for id := range s.members {
					if id.number != 0 { // else there is no number left for it
						grants[id.number] = append(grants[id.number], grantsTo(id, c, p, i, j, fixed)...)
					}
				}
			}
		}
	}
	for _, peer := range slices.Sorted(maps.Keys(grants)) {
		k.Allows = append(k.Allows, allowsOf(peer, grants[peer])...)
	}
	k.Blocks = disjointBlocks(blocks)
	return k
}

// compileWith works out what a class of NetworkPolicies allows, which was known before but for what it allows with some identities.
func (m *Model) compileWith(c *classState, was *Class, with map[Number]bool) *Class {
	k := *was
	k.Allows = nil
	rest := was.Allows
	until := func(n Number) {
		end, _ := slices.BinarySearchFunc(rest, n, func(a Allow, n Number) int { return cmp.Compare(a.Peer, n) })
		k.Allows = append(k.Allows, rest[:end]...)
		for rest = rest[end:]; len(rest) > 0 && rest[0].Peer == n; {
			rest = rest[1:]
		}
	}
	for _, n := range slices.Sorted(maps.Keys(with)) {
		if n == 0 {
			continue // of those for which there is no number left, nothing is known
		}
		until(n)
		if id := m.numbered[n]; id != nil {
			k.Allows = append(k.Allows, allowsOf(n, grantsWith(id, c))...)
		}
	}
	k.Allows = append(k.Allows, rest...)
	return &k
}

// grantsWith are what a class's policies grant with an identity, by rules that select it.
func grantsWith(id *identity, c *classState) (list []Grant) {
	for _, p := range c.policies {
		for i, r := range p.Rules[c.direction] {
			for j, s := range p.peers[c.direction][i] {
				if s != nil && s.members[id] {
					list = append(list, grantsTo(id, c, p, i, j, fixedGrants(r, c))...)
				}
			}
		}
	}
	return list
}

// grantsTo are what the rule i of a policy grants with an identity that its peer j selects. fixed is what it grants whoever the peer is.
func grantsTo(id *identity, c *classState, p *policyState, i, j int, fixed []Grant) []Grant {
	r := p.Rules[c.direction][i]
	list, position := fixed, r.Position
	if r.AnyPeer { // everyone has these already
		list = nil
	} else {
		position = r.Peers[j].Position
	}
	if c.direction == Egress {
		list = slices.Concat(list, namedGrants(r, id))
	}
	return by(p.ID, position, list)
}

// by is a list of grants as those of a rule.
func by(p ID, position string, list []Grant) []Grant {
	list = slices.Clone(list)
	for i := range list {
		list[i].By = Reason{ID: p, Position: position}
	}
	return list
}

// allowsOf are what is allowed with a peer that is granted something.
func allowsOf(peer Number, grants []Grant) []Allow {
	list := disjoint(grants)
	all := make([]Allow, len(list))
	for i, g := range list {
		all[i] = Allow{peer, g}
	}
	return all
}

// fixedGrants are what a rule grants whoever the peer is. A name is known where the pods of the class are the destination.
func fixedGrants(r Rule, c *classState) (list []Grant) {
	if r.AnyPort {
		return []Grant{{All: true}}
	}
	for _, p := range r.Ports {
		if p.Name == "" {
			list = append(list, Grant{Protocol: p.Protocol, From: p.From, To: p.To})
		} else if c.direction == Ingress {
			list = append(list, named(p, c.ports)...)
		}
	}
	return list
}

// namedGrants are what a rule grants by the names of a destination's ports.
func namedGrants(r Rule, id *identity) (list []Grant) {
	for _, p := range r.Ports {
		if p.Name != "" {
			list = append(list, named(p, id.ports)...)
		}
	}
	return list
}

func named(p Port, ports []PodPort) (list []Grant) {
	for _, q := range ports {
		if q.Name == p.Name && (q.Protocol == p.Protocol || p.Protocol == 0) {
			list = append(list, Grant{Protocol: q.Protocol, From: q.Number, To: q.Number})
		}
	}
	return list
}

// disjoint leaves out of grants what others before them grant already, in the order in which policies and rules stand: each port
// is granted by the first that does.
func disjoint(list []Grant) []Grant {
	if i := slices.IndexFunc(list, func(g Grant) bool { return g.All }); i >= 0 {
		return []Grant{list[i]}
	}
	var all []Grant
	for _, g := range list {
		left := []Grant{g}
		for _, have := range all {
			if have.Protocol != g.Protocol {
				continue
			}
			var next []Grant
			for _, l := range left {
				if l.To < have.From || have.To < l.From {
					next = append(next, l)
					continue
				}
				if l.From < have.From {
					before := l
					before.To = have.From - 1
					next = append(next, before)
				}
				if l.To > have.To {
					after := l
					after.From = have.To + 1
					next = append(next, after)
				}
			}
			left = next
		}
		all = append(all, left...)
	}
	slices.SortFunc(all, Grant.compare)
	return all
}

// span is a range of addresses.
type span struct{ first, last netip.Addr }

// spans are a block's addresses, but for those that are excepted.
func spans(b Block) (list []span) {
	from, end := b.Prefix.Addr(), inet.Last(b.Prefix)
	for _, e := range inet.Disjoint(b.Except) {
		if !b.Prefix.Overlaps(e) {
			continue
		}
		if e.Bits() <= b.Prefix.Bits() {
			return nil
		}
		if from.Less(e.Addr()) {
			list = append(list, span{from, e.Addr().Prev()})
		}
		if from = inet.Last(e).Next(); !from.IsValid() || end.Less(from) {
			return list
		}
	}
	return append(list, span{from, end})
}

// disjointBlocks cuts ranges where others begin and end, and merges what is granted for each piece.
func disjointBlocks(list []AllowBlock) (all []AllowBlock) {
	spans := make([]span, len(list))
	for i, b := range list {
		spans[i] = span{b.First, b.Last}
	}
	return cut(spans, func(of []int) []Grant {
		var grants []Grant
		for _, i := range of {
			grants = append(grants, list[i].Grant)
		}
		return disjoint(grants)
	})
}

// cut cuts ranges where others begin and end, and joins neighbours for which the same follows. What follows for a piece is asked of the ranges
// that it is in, by their index, in order.
func cut(list []span, follows func(of []int) []Grant) (all []AllowBlock) {
	for _, f := range inet.Families {
		all = append(all, cutFamily(list, f, follows)...)
	}
	return all
}

// cutFamily is cut for the ranges of one family.
func cutFamily(list []span, f inet.Family, follows func(of []int) []Grant) (all []AllowBlock) {
	type edge struct {
		at   netip.Addr // the first address for which it is so
		i    int        // in the list
		open bool
	}
	var edges []edge
	for i, b := range list {
		if inet.FamilyOf(b.first) != f {
			continue
		}
		edges = append(edges, edge{b.first, i, true})
		if next := b.last.Next(); next.IsValid() { // else it reaches to the last address of all
			edges = append(edges, edge{next, i, false})
		}
	}
	slices.SortFunc(edges, func(a, b edge) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.i, b.i)) })
	active := map[int]bool{}
	var before []AllowBlock // the piece before, to join what is the same
	for i := 0; i < len(edges); {
		at := edges[i].at
		for ; i < len(edges) && edges[i].at == at; i++ {
			if edges[i].open {
				active[edges[i].i] = true
			} else {
				delete(active, edges[i].i)
			}
		}
		of := slices.Sorted(maps.Keys(active))
		var last netip.Addr
		for _, j := range of {
			last = list[j].last // of all that end at no edge; else the next edge is nearer
		}
		if i < len(edges) {
			last = edges[i].at.Prev()
		}
		var piece []AllowBlock
		for _, g := range follows(of) {
			piece = append(piece, AllowBlock{at, last, g})
		}
		if len(piece) > 0 && slices.EqualFunc(before, piece, func(x, y AllowBlock) bool { return x.Grant == y.Grant }) {
			for j := range before {
				before[j].Last = last
			}
			continue
		}
		all = append(all, piece...)
		before = all[len(all)-len(piece):]
	}
	return all
}
