package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Allowed returns what policies allow from one address to another, of both ends together: everything is one Grant, and nothing is none.
// It has no reasons, of which there would be one for each end.
func (f Facts) Allowed(from, to netip.Addr) []Grant {
	if from == to { // a pod cannot be kept from itself
		return []Grant{{All: true}}
	}
	out, in := f.side(Egress, from, to), f.side(Ingress, to, from)
	var both []Grant
	for _, a := range out {
		for _, b := range in {
			switch {
			case a.All:
				both = append(both, b)
			case b.All:
				both = append(both, a)
			case a.Protocol == b.Protocol && a.From <= b.To && b.From <= a.To:
				both = append(both, Grant{Protocol: a.Protocol, From: max(a.From, b.From), To: min(a.To, b.To)})
			}
		}
	}
	return merged(both)
}

// side returns what the policies of one end allow.
func (f Facts) side(d Direction, subject, peer netip.Addr) (list []Grant) {
	c := f.Classes[f.Addrs[subject].Isolated[d]]
	if c == nil {
		return []Grant{{All: true}}
	}
	for _, a := range c.Allows {
		if a.Peer == 0 || a.Peer == f.Addrs[peer].Peer {
			list = append(list, a.Grant)
		}
	}
	for _, b := range c.Blocks {
		if peer.Compare(b.First) >= 0 && peer.Compare(b.Last) <= 0 {
			list = append(list, b.Grant)
		}
	}
	return merged(list)
}

// merged joins what overlaps or follows one another, and leaves out reasons.
func merged(list []Grant) (all []Grant) {
	for i := range list {
		list[i].By = Reason{}
	}
	slices.SortFunc(list, Grant.compare)
	for _, g := range list {
		if g.All {
			return []Grant{{All: true}}
		}
		if n := len(all) - 1; n >= 0 && all[n].Protocol == g.Protocol && int(g.From) <= int(all[n].To)+1 {
			all[n].To = max(all[n].To, g.To)
			continue
		}
		all = append(all, g)
	}
	return all
}

// GrantsText writes grants for people: "all", "none", "80/TCP, 8000-9000/UDP".
func GrantsText(list []Grant) string {
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
