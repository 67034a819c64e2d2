package policy

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Miss is a rule of a policy that isolates a pod, and what of it fits a packet. One that both fit allows the packet, unless the port fits
// by a name and the peer by a range of addresses: the names of their ports are nobody's.
type Miss struct {
	Reason
	Peer, Port bool
}

// Misses returns the rules of NetworkPolicies that are asked about a packet in a direction, in the order in which they are: with a Verdict that denies it they
// say why none allows it.
func (m *Model) Misses(d Direction, p Packet) (list []Miss) {
	subject, peer := p.To, p.From
	if d == Egress {
		subject, peer = peer, subject
	}
	of := m.identityAt(subject)
	if of == nil {
		return nil
	}
	var destination []PodPort
	if to := m.claimant(p.To); to != nil {
		destination = to.Ports
	}
	for _, q := range m.isolating(of, d) {
		for i, r := range q.Rules[d] {
			list = append(list, Miss{Reason{ID: q.ID, Position: r.Position}, m.fits(r, q.peers[d][i], peer), r.hasPort(p, destination)})
		}
	}
	return list
}

// fits says whether a peer is one of a rule's.
func (m *Model) fits(r Rule, of []*peers, peer netip.Addr) bool {
	if r.AnyPeer {
		return true
	}
	id := m.identityAt(peer)
	for i, s := range of {
		if s != nil {
			if id != nil && s.members[id] {
				return true
			}
		} else if b := r.Peers[i].Block; b.Prefix.Contains(peer) && !inet.Contains(b.Except, peer) {
			return true
		}
	}
	return false
}

func (r Rule) hasPort(p Packet, destination []PodPort) bool {
	return r.AnyPort || slices.ContainsFunc(r.Ports, func(q Port) bool {
		if q.Name != "" {
			return slices.ContainsFunc(named(q, destination), func(g Grant) bool { return g.covers(p) })
		}
		return Grant{Protocol: q.Protocol, From: q.From, To: q.To}.covers(p)
	})
}

// PodAt returns the name of the pod that has an address.
func (m *Model) PodAt(a netip.Addr) (service.Name, bool) {
	if p := m.claimant(a); p != nil {
		return p.Name, true
	}
	return service.Name{}, false
}

// identityAt returns the identity of an address, nil if it is no pod's.
func (m *Model) identityAt(a netip.Addr) *identity {
	if p := m.claimant(a); p != nil {
		return p.at[a]
	}
	return nil
}
