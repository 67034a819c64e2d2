package ruleset

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// MasqueradeTable is the table that masquerades pods' packets to destinations outside the cluster with their node's address.
const MasqueradeTable = podnet.MasqueradeTable

// The sets of the table. Each exists once for IPv4 and once for IPv6, with 4 or 6 appended.
const (
	ownPods       = "own_pods"
	podCIDRs      = "pod_cidrs"
	nodeAddrs     = "node_addrs"
	nonMasquerade = "non_masquerade"
)

// SetMasquerade makes the kernel masquerade as m says, and returns the number of elements that it changed.
func (r *Ruleset) SetMasquerade(m podnet.Masquerade) (diff.Count, error) {
	return r.set(masqueradeTable(m))
}

// Masquerade reads back what SetMasquerade set. A table that is missing, or whose rules are not ours, counts as empty.
func (r *Ruleset) Masquerade() (podnet.Masquerade, error) {
	have, found, err := r.read(masqueradeTable(podnet.Masquerade{}))
	if !found || err != nil {
		return podnet.Masquerade{}, err
	}
	return podnet.Masquerade{Sources: have.prefixes(ownPods), Pods: have.prefixes(podCIDRs), Nodes: have.addrs(nodeAddrs),
		Others: have.prefixes(nonMasquerade)}, nil
}

func masqueradeTable(m podnet.Masquerade) nft.Table {
	t := nft.Table{Name: MasqueradeTable, Elements: elements{}}
	postrouting := nft.Hooked("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource)
	for _, f := range inet.Families {
		t.Sets = append(t.Sets,
			prefixSet(ownPods, f, "this node's pods"),
			prefixSet(podCIDRs, f, "every node's pods"),
			addrSet(nodeAddrs, f, "nodes that pods' packets reach as they are"),
			prefixSet(nonMasquerade, f, "others that are to see pods' own addresses"),
		)
		t.Elements[named(ownPods, f)], t.Elements[named(podCIDRs, f)] = ofPrefixes(m.Sources, f), ofPrefixes(m.Pods, f)
		t.Elements[named(nodeAddrs, f)], t.Elements[named(nonMasquerade, f)] = ofAddrs(m.Nodes, f), ofPrefixes(m.Others, f)
		// Ports are random: otherwise two packets that a pod sends at the same time, as resolvers do, race for one port.
		postrouting.Add("pods' packets that leave the cluster take the node's address", isFamily(f), isIn(sourceOf(f), named(ownPods, f)),
			isNotIn(destinationOf(f), named(podCIDRs, f)), isNotIn(destinationOf(f), named(nodeAddrs, f)),
			isNotIn(destinationOf(f), named(nonMasquerade, f)), []expr.Any{&expr.Masq{FullyRandom: true}})
	}
	t.Chains = []nft.Chain{postrouting}
	return t
}
