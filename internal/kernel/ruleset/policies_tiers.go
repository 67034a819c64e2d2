package ruleset

import (
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// What the table of policies holds of ClusterNetworkPolicies. Which of their rules comes first is decided before (policy.Class): a packet
// meets one answer, which is to return (accepted), to go to denied_ingress or denied_egress, or to go on to what is behind the tier: the pod's NetworkPolicies. A
// pod under such policies has a chain of its own in the maps ingress and egress, and the chain of its NetworkPolicies in those of what is
// behind; so whoever is under none pays nothing.
const (
	tierPeers      = "tier_peers"       // class . identity: verdict
	tierPorts      = "tier_ports"       // class . identity . protocol . port: verdict
	tierPortRanges = "tier_port_ranges" // the same, for ranges
	tierBlocks     = "tier_blocks"      // class . addresses: verdict
	tierBlockPorts = "tier_block_ports" // class . protocol . ports . addresses: verdict
	behindIn       = "behind_ingress"   // address of an own pod under a tier: chain of its class of NetworkPolicies
	behindOut      = "behind_egress"
	egressToNode   = "egress_to_node" // address of an own pod: chain of its class, for what it sends to the node itself
)

func behind(d policy.Direction) string {
	if d == policy.Egress {
		return behindOut
	}
	return behindIn
}

func tierJudgeChain(d policy.Direction) string { return "judge_" + d.String() + "_tiers" }

// behindChain is not called as the maps are, whose names have the family appended.
func behindChain(d policy.Direction) string { return "pass_" + d.String() }

func tierSets() []*nft.Set {
	join := nftables.MustConcatSetType
	number, proto, port, to := nftables.TypeClassID, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeVerdict
	all := []*nft.Set{
		{Name: tierPeers, Comment: "class:identity, and what becomes of whatever has no answer of its own port", Key: number, Data: to, Parts: true},
		{Name: tierPorts, Comment: "class:identity and a port", Key: join(number, proto, port), Data: to, Parts: true},
		{Name: tierPortRanges, Comment: "the same for ranges of ports", Key: join(number, proto, port), Data: to, Interval: true, Parts: true},
	}
	for _, f := range inet.Families {
		addr := addrType(f)
		for _, s := range []*nft.Set{
			{Name: tierBlocks, Comment: "class:0 and addresses of no pods", Key: join(number, addr), Data: to, Interval: true, Parts: true},
			{Name: tierBlockPorts, Comment: "class:0, ports, and addresses of no pods", Key: join(number, proto, port, addr), Data: to, Interval: true, Parts: true},
			{Name: behindIn, Comment: "pods that are isolated for what comes to them, where a tier passes it", Key: addr, Data: to, Parts: true},
			{Name: behindOut, Comment: "pods that are isolated for what they send, where a tier passes it", Key: addr, Data: to, Parts: true},
			{Name: egressToNode, Comment: "pods, and what a tier says of what they send to this node", Key: addr, Data: to, Parts: true},
		} {
			s.Name = named(s.Name, f)
			all = append(all, s)
		}
	}
	return all
}

// tierJudge is the chain that looks up what a class of tiers answers. The packet's priority has class and identity; that of an address
// which is no pod's is 0, and no other is in the sets of addresses.
func tierJudge(d policy.Direction) nft.Chain {
	c := nft.Chain{Name: tierJudgeChain(d)}
	word := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	c.Add("a pod for whose identity no number is left", []expr.Any{carried(spare),
		&expr.Bitwise{SourceRegister: reg(spare), DestRegister: reg(spare), Len: 4, Mask: word(0xffff), Xor: word(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg(spare), Data: word(uint32(policy.Unnumbered))}}, goTo(Record{Denied, d}.chain()))
	portKey := []expr.Any{carried(0), &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(1)},
		&expr.Payload{DestRegister: reg(2), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
	answer := func(set string) []expr.Any {
		return []expr.Any{&expr.Lookup{SourceRegister: reg(0), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: set}}
	}
	c.Add("what is said of the peer's identity and the port", portKey, answer(tierPorts))
	c.Add("or of a range of ports", portKey, answer(tierPortRanges))
	c.Add("or of the peer's identity alone", []expr.Any{carried(0)}, answer(tierPeers))
	for _, f := range inet.Families {
		peer := func(word int) []expr.Any { _, p := ends(d, f); return []expr.Any{at(p, word)} }
		c.Add("or of the peer's address and the port", isFamily(f), portKey, peer(3), answer(named(tierBlockPorts, f)))
		c.Add("or of the address alone", isFamily(f), []expr.Any{carried(0)}, peer(1), answer(named(tierBlocks, f)))
	}
	c.Add("no rule is for it", []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: behindChain(d)}})
	return c
}

// tierBehind is the chain of what no rule of a tier has accepted or denied.
func tierBehind(d policy.Direction) nft.Chain {
	c := nft.Chain{Name: behindChain(d)}
	if d == policy.Egress {
		c.Add("NetworkPolicies are not about a pod's own node", []expr.Any{&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL)}}, verdict(expr.VerdictReturn))
	}
	for _, f := range inet.Families {
		subject, _ := ends(d, f)
		c.Add("the pod's NetworkPolicies decide", isFamily(f), []expr.Any{subject, judge(named(behind(d), f))})
	}
	return c
}

// policyInput is the chain of what pods send to their own node. NetworkPolicies always allow it; a ClusterNetworkPolicy may be about a node.
// The node's own packets to its pods are asked about nowhere: the kubelet's probes are among them.
func policyInput() nft.Chain {
	c := nft.Hooked("input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter)
	c.Add("what belongs to a connection that is there, or is about one", inFlow(expr.CmpOpNeq), verdict(expr.VerdictAccept))
	c.Add("how neighbours find each other, which is of no connection", []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}}, &expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, uint32(expr.CtStateBitUNTRACKED)), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}}, verdict(expr.VerdictAccept))
	for _, f := range inet.Families {
		c.Add("a pod of this node whose policies are not known yet", isFamily(f), isIn(sourceOf(f), named(ownPods, f)), isNotIn(sourceOf(f), named(judged, f)), goTo(Record{Closed, policy.Egress}.chain()))
	}
	zero := []expr.Any{&expr.Immediate{Register: reg(spare), Data: make([]byte, 4)}, carry(spare)}
	c.Add("the peer is no pod", zero)
	for _, f := range inet.Families {
		c.Add("what a tier says of the node", isFamily(f), []expr.Any{sourceOf(f), judge(named(egressToNode, f))})
	}
	c.Add("packets go on with the priority that they have unless told", zero)
	return c
}

// tierElements are the answers of a class of tiers.
func tierElements(c *policy.Class, yield func(set string, e nft.Element)) {
	element := func(g policy.Grant, key, keyEnd string) nft.Element {
		e := nft.Element{Key: key, KeyEnd: keyEnd, Verdict: true, Code: expr.VerdictReturn, Comment: commented(g.By.String())}
		switch g.Action {
		case policy.Deny:
			e.Code, e.Value = expr.VerdictGoto, Record{Denied, c.Direction}.chain()
		case policy.Pass:
			e.Code, e.Value = expr.VerdictGoto, behindChain(c.Direction)
		}
		return e
	}
	for _, a := range c.Allows {
		key := classID(c.Number, a.Peer)
		switch from, to := protocolAndPort(a.Grant, a.From), protocolAndPort(a.Grant, a.To); {
		case a.All:
			yield(tierPeers, element(a.Grant, key, ""))
		case a.From == a.To:
			yield(tierPorts, element(a.Grant, key+from, ""))
		default:
			yield(tierPortRanges, element(a.Grant, key+from, key+to))
		}
	}
	key := classID(c.Number, 0)
	for _, b := range c.Blocks {
		f := inet.FamilyOf(b.First)
		first, last := string(b.First.AsSlice()), string(b.Last.AsSlice())
		if b.All {
			yield(named(tierBlocks, f), element(b.Grant, key+first, key+last))
		} else {
			yield(named(tierBlockPorts, f), element(b.Grant, key+protocolAndPort(b.Grant, b.From)+first, key+protocolAndPort(b.Grant, b.To)+last))
		}
	}
}

// isTierVerdict says whether an element is an answer of a class of tiers.
func isTierVerdict(e nft.Element) bool {
	switch e.Value {
	case "":
		return e.Code == expr.VerdictReturn
	case Record{Denied, policy.Ingress}.chain(), Record{Denied, policy.Egress}.chain(), behindChain(policy.Ingress), behindChain(policy.Egress):
		return e.Code == expr.VerdictGoto
	}
	return false
}
