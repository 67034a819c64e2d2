package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// UnservedTable is the table that answers for Services' addresses where no Service does: docs/design/nftables.md.
const UnservedTable = "fathom-unserved"

// The sets of the table, each once for IPv4 and once for IPv6: the number is appended.
const (
	unservedAddrs  = "services"
	unservedPing   = "load_balancers"
	unservedOthers = "others"
)

// SetUnserved has the kernel answer as u says, and returns the number of elements that it changed.
func (r *Ruleset) SetUnserved(u service.Unserved) (diff.Count, error) {
	u = UnservedAsHeld(u)
	want := elements{}
	for _, f := range inet.Families {
		want[named(unservedAddrs, f)] = alone(u.Ranges, f)
		want[named(unservedPing, f)], want[named(unservedOthers, f)] = single(u.LoadBalancers, f), single(u.Others, f)
	}
	return r.set(unservedTable(u.Node), want)
}

// UnservedAsHeld is u as the kernel holds it: the addresses of load balancers are among the ranges, no range is within another,
// and all is sorted. Of the node's addresses there is one of each family.
func UnservedAsHeld(u service.Unserved) service.Unserved {
	ranges := slices.Clone(u.Ranges)
	for _, a := range u.LoadBalancers {
		ranges = append(ranges, netip.PrefixFrom(a, a.BitLen()))
	}
	sorted := func(all []netip.Addr) []netip.Addr {
		return slices.Compact(slices.SortedFunc(slices.Values(all), netip.Addr.Compare))
	}
	held := service.Unserved{Ranges: outermost(ranges), LoadBalancers: sorted(u.LoadBalancers), Others: sorted(u.Others)}
	for _, f := range inet.Families {
		if i := slices.IndexFunc(u.Node, func(a netip.Addr) bool { return inet.FamilyOf(a) == f }); i >= 0 {
			held.Node = append(held.Node, u.Node[i])
		}
	}
	return held
}

// Unserved reads back what SetUnserved set, as UnservedAsHeld has it, on a node with these addresses. It is not found where
// the table is not there, or does something else, such as to answer by another address.
func (r *Ruleset) Unserved(node []netip.Addr) (u service.Unserved, found bool, err error) {
	have, _, err := r.read(unservedTable(node))
	if errors.Is(err, errStrange) {
		return u, false, nil
	}
	if err != nil {
		return u, false, fmt.Errorf("read nftables table inet %s: %w", UnservedTable, err)
	}
	for _, f := range inet.Families {
		u.Ranges = prefixes(u.Ranges, have[named(unservedAddrs, f)])
		u.LoadBalancers = addrs(u.LoadBalancers, have[named(unservedPing, f)])
		u.Others = addrs(u.Others, have[named(unservedOthers, f)])
	}
	u.Node = node
	return UnservedAsHeld(u), true, nil
}

// afterNAT is when all that is for a Service has its endpoint's address: nftables' `dstnat + 10`.
var afterNAT = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10)

// unservedTable is of a node with these addresses, up to one of each family.
func unservedTable(node []netip.Addr) table {
	t := table{name: UnservedTable, variant: fmt.Sprint(node)}
	refuse := chain{name: "refuse", rules: refuseRules()}
	prerouting := chain{name: "prerouting", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookPrerouting, priority: afterNAT}
	output := chain{name: "output", kind: nftables.ChainTypeFilter, hook: nftables.ChainHookOutput, priority: afterNAT}
	pingPrerouting := chain{name: "ping_prerouting", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest}
	pingOutput := chain{name: "ping_output", kind: nftables.ChainTypeNAT, hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest}
	for _, f := range inet.Families {
		t.sets = append(t.sets,
			set{name: named(unservedAddrs, f), comment: "Services' ranges and addresses", family: f, interval: true},
			set{name: named(unservedPing, f), comment: "load balancers' addresses", family: f},
			set{name: named(unservedOthers, f), comment: "addresses of Services that another proxy carries", family: f},
		)
		for _, c := range []*chain{&prerouting, &output} {
			c.add("no Service has this port of the address, or nobody the address", firstOfFlow(), isFamily(f),
				isIn(destinationOf(f), named(unservedAddrs, f)), isNotIn(destinationOf(f), named(unservedOthers, f)), notLocal(), jump(refuse.name))
		}
		i := slices.IndexFunc(node, func(a netip.Addr) bool { return inet.FamilyOf(a) == f })
		if i < 0 {
			continue
		}
		// Not `redirect`, which takes an address of the device: those of pods have none.
		answer := []expr.Any{&expr.Immediate{Register: 1, Data: node[i].AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(nfproto(f)), RegAddrMin: 1, RegAddrMax: 1}}
		for _, c := range []*chain{&pingPrerouting, &pingOutput} {
			c.add("the node that gets it answers", isFamily(f), isEchoRequest(f), isIn(destinationOf(f), named(unservedPing, f)), answer)
		}
	}
	t.chains = []chain{refuse, prerouting, output, pingPrerouting, pingOutput}
	return t
}

// firstOfFlow matches what belongs to no flow that has had an answer: few of a node's packets are looked up.
func firstOfFlow() []expr.Any {
	flows := expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, uint32(flows)), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)},
	}
}

// notLocal matches what is not for the node itself. Some give a node a Service's address on purpose, as NodeLocal DNSCache
// does with that of the cluster's DNS.
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
