package ruleset

import (
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// MasqueradeTable is the table that gives packets of pods to the world outside their node's address.
const MasqueradeTable = "fathom-masquerade"

// The sets of the table, each once for IPv4 and once for IPv6: the number is appended.
const (
	ownPods       = "own_pods"
	podCIDRs      = "pod_cidrs"
	nodeAddrs     = "node_addrs"
	nonMasquerade = "non_masquerade"
)

// SetMasquerade makes the kernel masquerade as m says, and returns the number of elements that it changed.
func (r *Ruleset) SetMasquerade(m podnet.Masquerade) (diff.Count, error) {
	want := elements{}
	for _, f := range inet.Families {
		want[named(ownPods, f)], want[named(podCIDRs, f)] = alone(m.Sources, f), alone(m.Pods, f)
		want[named(nodeAddrs, f)], want[named(nonMasquerade, f)] = single(m.Nodes, f), alone(m.Others, f)
	}
	return r.set(masqueradeTable(), want)
}

// Masquerade reads back what SetMasquerade set. A table that is not there, or that does something else, is as
// good as one that holds nothing.
func (r *Ruleset) Masquerade() (podnet.Masquerade, error) {
	var m podnet.Masquerade
	have, _, err := r.read(masqueradeTable())
	if errors.Is(err, errStrange) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	for _, f := range inet.Families {
		m.Sources = prefixes(m.Sources, have[named(ownPods, f)])
		m.Pods = prefixes(m.Pods, have[named(podCIDRs, f)])
		m.Nodes = addrs(m.Nodes, have[named(nodeAddrs, f)])
		m.Others = prefixes(m.Others, have[named(nonMasquerade, f)])
	}
	return m, nil
}

func named(set string, f inet.Family) string {
	if f == inet.IPv4 {
		return set + "4"
	}
	return set + "6"
}

func masqueradeTable() table {
	t := table{name: MasqueradeTable}
	postrouting := chain{name: "postrouting", kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource}
	for _, f := range inet.Families {
		t.sets = append(t.sets,
			set{name: named(ownPods, f), comment: "this node's pods", family: f, interval: true},
			set{name: named(podCIDRs, f), comment: "every node's pods", family: f, interval: true},
			set{name: named(nodeAddrs, f), comment: "nodes that pods' packets reach as they are", family: f},
			set{name: named(nonMasquerade, f), comment: "others that are to see pods' own addresses", family: f, interval: true},
		)
		exprs := []expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto(f)}},
			sourceOf(f), &expr.Lookup{SourceRegister: 1, SetName: named(ownPods, f)},
		}
		for _, s := range []string{podCIDRs, nodeAddrs, nonMasquerade} {
			exprs = append(exprs, destinationOf(f), &expr.Lookup{SourceRegister: 1, SetName: named(s, f), Invert: true})
		}
		// Random ports: two packets of one pod at the same time, as resolvers send them, would else race for one.
		postrouting.rules = append(postrouting.rules, rule{
			comment: "pods' packets that leave the cluster take the node's address",
			exprs:   append(exprs, &expr.Masq{FullyRandom: true}),
		})
	}
	t.chains = []chain{postrouting}
	return t
}

func nfproto(f inet.Family) byte {
	if f == inet.IPv4 {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

func sourceOf(f inet.Family) *expr.Payload {
	if f == inet.IPv4 {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	}
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 16}
}

func destinationOf(f inet.Family) *expr.Payload {
	if f == inet.IPv4 {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	}
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 16}
}
