package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Allowed returns what policies allow from one address to another, of both ends together: everything is one Grant, and nothing is none. One of
// the protocol 0 stands for all that have no ports. It has no reasons, of which there would be one for each end.
func (f Facts) Allowed(from, to netip.Addr) []Grant {
	if from == to { // a pod cannot be kept from itself
		return []Grant{{All: true}}
	}
	sides := []side{f.side(Egress, from, to), f.side(Ingress, to, from)}
	var list []ruling // for their edges alone
	for _, s := range sides {
		for _, g := range slices.Concat(s.tiers, s.granted) {
			list = append(list, ruling{Grant: g})
		}
	}
	var all []Grant
	whole := true
	for _, protocol := range slices.Concat([]service.Protocol{0}, protocols) {
		ranges := pieces(protocol, list)
		if ranges == nil {
			ranges = []Grant{{Protocol: protocol, To: 1<<16 - 1}}
		}
		for _, g := range ranges {
			p := Packet{Protocol: protocol, Port: g.From}
			if slices.ContainsFunc(sides, func(s side) bool { return !s.allows(p) }) {
				whole = false
			} else if n := len(all) - 1; n >= 0 && all[n].Protocol == protocol && int(all[n].To)+1 == int(g.From) {
				all[n].To = g.To
			} else {
				all = append(all, g)
			}
		}
	}
	if whole {
		return []Grant{{All: true}}
	}
	return all
}

// side is what policies of one end say of the other.
type side struct {
	tiers    []Grant
	isolated bool
	granted  []Grant
	closed   bool
}

func (f Facts) side(d Direction, subject, peer netip.Addr) (s side) {
	a, identity := f.Addrs[subject], f.Addrs[peer].Peer
	if n := a.Tiers[d]; n != 0 {
		s.tiers, s.closed = f.Classes[n].answers(identity, peer), identity == Unnumbered
	}
	if n := a.Isolated[d]; n != 0 && !a.Audited[d] {
		c := f.Classes[n]
		s.isolated, s.granted = true, slices.Concat(c.with(identity), c.with(0))
		for _, b := range c.Blocks {
			if peer.Compare(b.First) >= 0 && peer.Compare(b.Last) <= 0 {
				s.granted = append(s.granted, b.Grant)
			}
		}
	}
	return s
}

func (s side) allows(p Packet) bool {
	if s.closed {
		return false
	}
	answer, found := Grant{}, false
	for _, g := range s.tiers {
		if g.covers(p) && (!found || !g.All) {
			answer, found = g, true
		}
	}
	if found && answer.Action != Pass {
		return answer.Action == Accept
	}
	return !s.isolated || slices.ContainsFunc(s.granted, func(g Grant) bool { return g.covers(p) })
}

// GrantsText writes grants for people: "all", "none", "80/TCP, 8000-9000/UDP", "all but 80/TCP".
func GrantsText(list []Grant) string {
	if slices.ContainsFunc(list, func(g Grant) bool { return !g.All && g.Protocol == 0 }) {
		return "all but " + GrantsText(others(list))
	}
	var parts []string
	for _, g := range list {
		switch from := strconv.Itoa(int(g.From)); {
		case g.All:
			return "all"
		case g.From == 0 && g.To == 1<<16-1:
			parts = append(parts, g.Protocol.String())
		case g.From == g.To:
			parts = append(parts, from+"/"+g.Protocol.String())
		default:
			parts = append(parts, from+"-"+strconv.Itoa(int(g.To))+"/"+g.Protocol.String())
		}
	}
	return cmp.Or(strings.Join(parts, ", "), "none")
}

// others are the ports that grants are not for.
func others(list []Grant) (all []Grant) {
	for _, protocol := range protocols {
		next := 0
		for _, g := range list {
			if g.Protocol != protocol {
				continue
			}
			if next < int(g.From) {
				all = append(all, Grant{Protocol: protocol, From: uint16(next), To: g.From - 1})
			}
			next = int(g.To) + 1
		}
		if next < 1<<16 {
			all = append(all, Grant{Protocol: protocol, From: uint16(next), To: 1<<16 - 1})
		}
	}
	return all
}
