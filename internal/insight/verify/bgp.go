package verify

import (
	"cmp"
	"context"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// bgpVerb is the agent's command that prints its BGP sessions.
const bgpVerb = "bgp"

// RunBGP asks every node's agent what it announces, and compares that with the API.
func RunBGP(ctx context.Context, client *kube.Client) (Report, error) {
	r, err := readTwice(ctx, client, question[answer.BGP]{verb: bgpVerb, objects: readNetwork, compare: BGP})
	if err != nil {
		return Report{}, err
	}
	return r.report(func(n *NodeReport, s answer.BGP) {
		for _, x := range s.Sessions {
			if x.State == established {
				n.Sessions, n.Prefixes = n.Sessions+1, n.Prefixes+len(x.Told)
			}
		}
	}), nil
}

const established = "Established" // as RFC 4271 calls it

// BGP compares what a node announces to routers with what the cluster's BGPPeers and Nodes imply, computed from these
// objects. It takes from the agent for which addresses of Services the node may get packets, and which routers advertise
// themselves.
func BGP(c Cluster, node string, s answer.BGP) []podnet.Difference {
	d := differ{node: node}
	config, err := netconf.Parse(c.Config)
	if err != nil {
		config = netconf.Default() // the verification of pods reports the invalid one
	}
	own := netfacts.Read(c.Nodes, node, config).WithBlocks(c.pools().Blocks).Own
	facts := bgpconf.Node{Name: node, Addrs: own.Addrs, PodCIDRs: slices.Concat(own.PodCIDRs, own.Blocks),
		Links: s.Links, Heard: s.Heard, ServiceAddresses: s.ServiceAddresses}
	for _, n := range c.Nodes {
		if n.Name == node {
			facts.Labels = n.Labels
		}
	}
	var peers []*v1alpha1.BGPPeer
	for _, p := range c.BGPPeers {
		p = p.DeepCopy()
		p.Spec.PasswordSecret = nil // only agents read passwords, and report problems with them
		peers = append(peers, p)
	}
	want, problems := bgpconf.Read(peers, facts, nil)
	for _, p := range problems {
		d.add("%s", p)
	}
	if !s.Decided {
		if len(want.Peers) > 0 {
			d.add("BGP: the agent has not decided yet what it announces")
		}
		return d.found
	}
	for _, p := range want.Peers {
		i := slices.IndexFunc(s.Sessions, func(x answer.BGPSession) bool { return x.Peer == p.Name })
		switch {
		case i >= 0:
			d.session(p, s.Sessions[i])
		case s.Refused[p.Name] != "":
			d.add("BGPPeer %s: there is no session: %s", p.Name, s.Refused[p.Name])
		default:
			d.add("BGPPeer %s: the node has no session with %s", p.Name, p.Address)
		}
	}
	for _, x := range s.Sessions {
		if !slices.ContainsFunc(want.Peers, func(p bgpconf.Peer) bool { return p.Name == x.Peer }) {
			d.add("BGPPeer %s: there is a session with %s, but there should be none: the object is gone, or does not select this node", x.Peer, x.Address)
		}
	}
	table := "nftables: table inet " + service.AggregatesTable
	differences(inet.Disjoint(want.Aggregates()), s.Aggregates,
		func(p netip.Prefix) {
			d.add("%s: packets for unused addresses in %s, which is announced, go back to the router", table, p)
		},
		func(p netip.Prefix) {
			d.add("%s: packets for unused addresses in %s are refused, but it is not announced", table, p)
		})
	return d.found
}

// session compares a session with what it should be.
func (d *differ) session(p bgpconf.Peer, s answer.BGPSession) {
	if s.Address != p.Address {
		d.add("BGPPeer %s: the session is with %s instead of %s", p.Name, s.Address, p.Address)
	}
	if s.State != established {
		d.add("BGPPeer %s: the session with %s is %s: %s", p.Name, s.Address, s.State, cmp.Or(s.Reason, "no reason was given"))
	}
	told := map[netip.Prefix]bgpconf.Route{}
	for _, r := range s.Told {
		told[r.Prefix] = r
	}
	for _, r := range p.Routes {
		have, found := told[r.Prefix]
		delete(told, r.Prefix)
		if !found {
			d.add("BGPPeer %s: %s is not announced", p.Name, r.Prefix)
		} else if !have.Like(r) {
			d.add("BGPPeer %s: %s is announced with another next hop, other communities or another preference than the BGPPeer says", p.Name, r.Prefix)
		}
	}
	for _, r := range s.Told {
		if _, left := told[r.Prefix]; left {
			d.add("BGPPeer %s: %s is announced, but the BGPPeer does not advertise it", p.Name, r.Prefix)
		}
	}
}
