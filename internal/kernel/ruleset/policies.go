package ruleset

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// PolicyTable is the table that drops what no policy of an isolated pod allows: docs/design/policy.md.
const PolicyTable = "fathom-policy"

// The sets and maps of the table. Those that are about addresses are there once for IPv4 and once for IPv6: the number is appended. What
// others call "class . identity" is one number, as the packet's priority carries it.
const (
	identities      = "identities"        // address of any pod: identity
	isolatedIn      = "ingress"           // address of an own pod: chain of its class
	isolatedOut     = "egress"            //
	judged          = "judged"            // own pods whose policies are known
	themselves      = "themselves"        // address . the same address
	allowPeers      = "allow_peers"       // class . identity
	allowPorts      = "allow_ports"       // class . identity . protocol . port
	allowPortRanges = "allow_port_ranges" // the same, for ranges
	allowBlocks     = "allow_blocks"      // class . addresses
	allowBlockPorts = "allow_block_ports" // class . protocol . ports . addresses
)

// SetPolicies makes the kernel hold the policies that f says, for a node whose pods have addresses of these ranges, and returns the number
// of elements that it changed. What comes from or goes to an address of the ranges that f does not know is dropped.
func (r *Ruleset) SetPolicies(f policy.Facts, ranges []netip.Prefix) (diff.Count, error) {
	parts := maps.Collect(policyPartsOf(f))
	maps.DeleteFunc(parts, func(_ policyKey, p policyPart) bool { return !p.is() })
	count, err := r.policies.Set(policyTable(ranges, r.recordsNothing), maps.All(parts))
	if !r.recordsNothing && errors.Is(err, unix.ENOENT) { // the kernel cannot log: it drops all the same
		if count, err = r.policies.Set(policyTable(ranges, true), maps.All(parts)); err == nil {
			r.recordsNothing = true
		}
	}
	if err != nil {
		return count, err
	}
	r.policyParts = parts
	return count, nil
}

// ChangePolicies does what SetPolicies would, for what has changed (policy.Model.Changes), in one transaction: it reads nothing. If it
// fails, what the kernel holds is not what it was thought to, and SetPolicies is to be called.
func (r *Ruleset) ChangePolicies(changes policy.Facts) error {
	var list []nft.Change[policyKey, policyPart]
	for k, now := range policyPartsOf(changes) {
		c := nft.Change[policyKey, policyPart]{Key: k}
		if was, found := r.policyParts[k]; found {
			c.Old = &was
		}
		if now.is() {
			c.New = &now
		}
		if c.Old != nil || c.New != nil {
			list = append(list, c)
		}
	}
	if r.policyParts == nil {
		return errors.New("change the policies: they were not set before")
	}
	if err := r.policies.Change(list); err != nil {
		r.policyParts = nil
		return err
	}
	for _, c := range list {
		if delete(r.policyParts, c.Key); c.New != nil {
			r.policyParts[c.Key] = *c.New
		}
	}
	return nil
}

// HoldsPolicies says whether the kernel holds what SetPolicies and ChangePolicies left there. It may be called beside them.
func (r *Ruleset) HoldsPolicies(ctx context.Context) (bool, error) { return r.policies.Holds(ctx) }

// DeletePolicies takes the table away: everything is allowed. One that is not there is not an error.
func (r *Ruleset) DeletePolicies() error {
	r.policyParts = nil
	return r.policies.Delete(PolicyTable)
}

// policyTable is the table, in which packets are recorded unless it is silent.
func policyTable(ranges []netip.Prefix, silent bool) nft.Table {
	join := nftables.MustConcatSetType
	number, proto, port := nftables.TypeClassID, nftables.TypeInetProto, nftables.TypeInetService
	t := nft.Table{Name: PolicyTable, Elements: elements{}, Sets: []*nft.Set{
		{Name: allowPeers, Comment: "class:identity, with which everything is allowed", Key: number, Parts: true},
		{Name: allowPorts, Comment: "class:identity, with which a port is allowed; class:0 is anyone", Key: join(number, proto, port), Parts: true},
		{Name: allowPortRanges, Comment: "the same for ranges of ports", Key: join(number, proto, port), Interval: true, Parts: true},
	}}
	for _, f := range inet.Families {
		addr := addrType(f)
		for _, s := range []*nft.Set{
			{Name: identities, Comment: "pods, and what policies see in them", Key: addr, Data: number, Parts: true},
			{Name: isolatedIn, Comment: "this node's pods that are isolated for what comes to them", Key: addr, Data: nftables.TypeVerdict, Parts: true},
			{Name: isolatedOut, Comment: "this node's pods that are isolated for what they send", Key: addr, Data: nftables.TypeVerdict, Parts: true},
			{Name: judged, Comment: "this node's pods whose policies are known", Key: addr, Parts: true},
			{Name: themselves, Comment: "isolated pods, which may meet themselves", Key: join(addr, addr), Parts: true},
			{Name: allowBlocks, Comment: "class:0 and addresses with which everything is allowed", Key: join(number, addr), Interval: true, Parts: true},
			{Name: allowBlockPorts, Comment: "class:0 and ports that are allowed with addresses", Key: join(number, proto, port, addr), Interval: true, Parts: true},
			{Name: ownPods, Comment: "addresses that this node gives to pods", Key: addr, Interval: true},
		} {
			s.Name = named(s.Name, f)
			t.Sets = append(t.Sets, s)
		}
		t.Elements[named(ownPods, f)] = ofPrefixes(ranges, f)
	}
	t.Sets = append(t.Sets, tierSets()...)
	t.Chains = []nft.Chain{policyForward(), policyForbidden(silent), policyInput()}
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		t.Chains = append(t.Chains, policyJudge(d, false), policyJudge(d, true), tierJudge(d), tierBehind(d))
	}
	t.Chains = append(t.Chains, recordChains(silent)...)
	if silent {
		t.Variant = "silent"
	} else {
		t.Sets = append(t.Sets, recordSets()...)
	}
	return t
}

// policyForward is the chain of what passes through the node, as Services have translated it. A pod's own node does not pass through: what
// it sends to its pods is always allowed, and so is what they send to it.
func policyForward() nft.Chain {
	c := nft.Hooked("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter)
	c.Add("what belongs to a connection that is allowed no more", isForbidden(), goTo(forbiddenChain))
	c.Add("what belongs to a connection that is there, or is about one", inFlow(expr.CmpOpNeq), verdict(expr.VerdictAccept))
	for _, f := range inet.Families {
		c.Add("a pod may always meet itself", isFamily(f), []expr.Any{at(sourceOf(f), 0), at(destinationOf(f), words(f)),
			&expr.Lookup{SourceRegister: reg(0), SetName: named(themselves, f)}}, verdict(expr.VerdictAccept))
	}
	for _, d := range []policy.Direction{policy.Egress, policy.Ingress} {
		for _, f := range inet.Families {
			subject, _ := ends(d, f)
			c.Add("a pod of this node whose policies are not known yet", isFamily(f), isIn(subject, named(ownPods, f)), isNotIn(subject, named(judged, f)), goTo(Record{Closed, d}.chain()))
		}
		c.Add("the peer is nobody in particular", []expr.Any{&expr.Immediate{Register: reg(spare), Data: make([]byte, 4)}, carry(spare)})
		for _, f := range inet.Families {
			subject, peer := ends(d, f)
			c.Add("or a pod, with an identity", isFamily(f), []expr.Any{peer, find(named(identities, f), 0, spare), carry(spare)})
			c.Add("an isolated pod's class knows what is allowed, and returns", isFamily(f), []expr.Any{subject, judge(named(isolated(d), f))})
		}
	}
	c.Add("packets leave with the priority that they have unless told", []expr.Any{&expr.Immediate{Register: reg(spare), Data: make([]byte, 4)}, carry(spare)})
	return c
}

// ends are the addresses of the pod that may be isolated, and of its peer.
func ends(d policy.Direction, f inet.Family) (subject, peer *expr.Payload) {
	if d == policy.Egress {
		return sourceOf(f), destinationOf(f)
	}
	return destinationOf(f), sourceOf(f)
}

func isolated(d policy.Direction) string {
	if d == policy.Egress {
		return isolatedOut
	}
	return isolatedIn
}

func judgeChain(d policy.Direction, audit bool) string {
	if audit {
		return "judge_" + d.String() + "_audit"
	}
	return "judge_" + d.String()
}

// policyJudge is the chain that looks up what a class allows. The packet's priority has class and identity. That of audited policies drops
// nothing.
func policyJudge(d policy.Direction, audit bool) nft.Chain {
	c := nft.Chain{Name: judgeChain(d, audit)}
	portKey := []expr.Any{carried(0), &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(1)},
		&expr.Payload{DestRegister: reg(2), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
	in := func(set string) []expr.Any { return []expr.Any{&expr.Lookup{SourceRegister: reg(0), SetName: set}} }
	look := func(who string) {
		c.Add("everything is allowed with "+who, []expr.Any{carried(0)}, in(allowPeers), verdict(expr.VerdictReturn))
		c.Add("the port is allowed with "+who, portKey, in(allowPorts), verdict(expr.VerdictReturn))
		c.Add("the port is one of a range that is allowed with "+who, portKey, in(allowPortRanges), verdict(expr.VerdictReturn))
	}
	look("pods of the peer's identity")
	c.Add("from here on the peer is anyone", priority(0xffff0000, 0))
	look("anyone")
	for _, f := range inet.Families {
		peer := func(word int) []expr.Any { _, p := ends(d, f); return []expr.Any{at(p, word)} }
		c.Add("everything is allowed with the address", isFamily(f), []expr.Any{carried(0)}, peer(1), in(named(allowBlocks, f)), verdict(expr.VerdictReturn))
		c.Add("the port is allowed with the address", isFamily(f), portKey, peer(3), in(named(allowBlockPorts, f)), verdict(expr.VerdictReturn))
	}
	if audit {
		c.Add("no policy of the pod allows it, and all of them are audited", goTo(Record{Audited, d}.chain()))
	} else {
		c.Add("no policy of the pod allows it", goTo(Record{Denied, d}.chain()))
	}
	return c
}

// priority is mark of the packet's priority.
func priority(mask, xor uint32) []expr.Any {
	word := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	return []expr.Any{carried(spare),
		&expr.Bitwise{SourceRegister: reg(spare), DestRegister: reg(spare), Len: 4, Mask: word(mask), Xor: word(xor)}, carry(spare)}
}

// classChain is the chain of a class, to which its pods' packets go.
type classChain struct {
	policy.Direction
	policy.Number
	tiers, audit bool
}

func (c classChain) name() string {
	kind := ""
	switch {
	case c.tiers:
		kind = "tiers_"
	case c.audit:
		kind = "audit_"
	}
	return fmt.Sprintf("%s_%s%04x", c.Direction, kind, uint16(c.Number))
}

// classChainOf is the reverse of name.
func classChainOf(name string) (c classChain, ok bool) {
	for _, d := range policy.Directions {
		hex, found := strings.CutPrefix(name, d.String()+"_")
		if !found {
			continue
		}
		c.Direction = d
		hex, c.tiers = strings.CutPrefix(hex, "tiers_")
		hex, c.audit = strings.CutPrefix(hex, "audit_")
		if number, err := strconv.ParseUint(hex, 16, 16); err == nil {
			c.Number = policy.Number(number)
			return c, c.name() == name
		}
	}
	return c, false
}

// Chain puts the class beside the identity, and has it judged.
func (c classChain) Chain() *nft.Chain {
	chain := &nft.Chain{Name: c.name()}
	next := judgeChain(c.Direction, c.audit)
	if c.tiers {
		next = tierJudgeChain(c.Direction)
	}
	own := priority(0xffff, uint32(c.Number)<<16)
	if c.audit {
		chain.Add("the class comes to the peer's identity", own, goTo(next))
		return chain
	}
	chain.Add("the class comes to the peer's identity", own, jump(next))
	chain.Add("what returns is allowed", goTo(Record{Accepted, c.Direction}.chain()))
	return chain
}

// Elements are none.
func (c classChain) Elements(func(string, nft.Element)) {}

func policyPartsOf(f policy.Facts) iter.Seq2[policyKey, policyPart] {
	return func(yield func(policyKey, policyPart) bool) {
		for n, c := range f.Classes {
			if !yield(policyKey{class: n}, policyPart{class: c}) {
				return
			}
		}
		for a, is := range f.Addrs {
			p := policyPart{addr: a, address: is}
			if !yield(policyKey{addr: a}, p) {
				return
			}
		}
	}
}
