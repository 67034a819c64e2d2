package ruleset

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// The sets of the table. Each exists once for IPv4 and once for IPv6, with 4 or 6 appended.
const (
	unservedAddrs  = "services"
	unservedPing   = "load_balancers"
	unservedOthers = "others"
)

// SetUnserved makes the kernel answer as u says, and returns the number of elements that it changed.
func (r *Ruleset) SetUnserved(u service.Unserved) (diff.Count, error) {
	return r.set(unservedTable(service.UnservedAsHeld(u)))
}

// Unserved reads back what SetUnserved set on a node with these addresses, in the form of service.UnservedAsHeld. found is false
// if the table is missing, or if its rules are not ours, such as those of a node with another address.
func (r *Ruleset) Unserved(node []netip.Addr) (u service.Unserved, found bool, err error) {
	have, found, err := r.read(unservedTable(service.Unserved{Node: node}))
	if !found || err != nil {
		return u, false, err
	}
	return service.UnservedAsHeld(service.Unserved{Ranges: have.prefixes(unservedAddrs), LoadBalancers: have.addrs(unservedPing),
		Others: have.addrs(unservedOthers), Node: node}), true, nil
}

// afterNAT is the priority after destination NAT (`dstnat + 10`): packets for Services have an endpoint's address by then.
var afterNAT = *nftables.ChainPriorityNATDest + 10

// unservedTable returns the table for u in the form of service.UnservedAsHeld, in which the node has at most one address of each
// family.
func unservedTable(u service.Unserved) nft.Table {
	t := nft.Table{Name: service.UnservedTable, Variant: fmt.Sprint(u.Node), Elements: elements{}}
	refuse := nft.Chain{Name: "refuse", Rules: refuseRules()}
	prerouting := nft.Hooked("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, afterNAT)
	output := nft.Hooked("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, afterNAT)
	pingPrerouting := nft.Hooked("ping_prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, *nftables.ChainPriorityNATDest)
	pingOutput := nft.Hooked("ping_output", nftables.ChainTypeNAT, nftables.ChainHookOutput, *nftables.ChainPriorityNATDest)
	for _, f := range inet.Families {
		t.Sets = append(t.Sets,
			prefixSet(unservedAddrs, f, "Services' ranges and addresses"),
			addrSet(unservedPing, f, "load balancers' addresses"),
			addrSet(unservedOthers, f, "addresses of Services that another proxy carries"),
		)
		t.Elements[named(unservedAddrs, f)] = ofPrefixes(u.Ranges, f)
		t.Elements[named(unservedPing, f)], t.Elements[named(unservedOthers, f)] = ofAddrs(u.LoadBalancers, f), ofAddrs(u.Others, f)
		for _, c := range []*nft.Chain{&prerouting, &output} {
			c.Add("no Service has this port of the address, or nobody the address", firstOfFlow(), isFamily(f),
				isIn(destinationOf(f), named(unservedAddrs, f)), isNotIn(destinationOf(f), named(unservedOthers, f)), notLocal(), jump(refuse.Name))
		}
		i := slices.IndexFunc(u.Node, func(a netip.Addr) bool { return inet.FamilyOf(a) == f })
		if i < 0 {
			continue
		}
		// `redirect` takes an address of the input device, and pods' devices have none. So the rule names one.
		answer := []expr.Any{&expr.Immediate{Register: 1, Data: u.Node[i].AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(nfproto(f)), RegAddrMin: 1, RegAddrMax: 1}}
		for _, c := range []*nft.Chain{&pingPrerouting, &pingOutput} {
			c.Add("the node that gets it answers", isFamily(f), isEchoRequest(f), isIn(destinationOf(f), named(unservedPing, f)), answer)
		}
	}
	t.Chains = []nft.Chain{refuse, prerouting, output, pingPrerouting, pingOutput}
	return t
}

// firstOfFlow matches packets of flows without an answer so far, so that only few of a node's packets are looked up.
func firstOfFlow() []expr.Any { return inFlow(expr.CmpOpEq) }

// notLocal matches packets that are not for the node itself. A node may have a Service's address on purpose: NodeLocal DNSCache
// assigns the address of the cluster's DNS.
func notLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)},
	}
}

func isEchoRequest(f inet.Family) []expr.Any {
	protocol, echo := byte(unix.IPPROTO_ICMP), byte(8) // ICMP_ECHO
	if f == inet.IPv6 {
		protocol, echo = unix.IPPROTO_ICMPV6, 128 // ICMPV6_ECHO_REQUEST
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{protocol}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{echo}},
	}
}
