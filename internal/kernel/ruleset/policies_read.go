package ruleset

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Policies returns what the table says, as the facts that SetPolicies takes, but for reasons and policies: the kernel has them in comments
// alone, which are cut. ranges are those of the node's pods. A table that is not there, or whose rules are not ours, is not found.
func (r *Ruleset) Policies() (f policy.Facts, ranges []netip.Prefix, found bool, err error) {
	f = policy.Facts{Addrs: map[netip.Addr]policy.Address{}, Classes: map[policy.Number]*policy.Class{}}
	rest, parts, found, err := r.policies.Read(policyTable(nil, r.recordsNothing))
	if err == nil && !found && !r.recordsNothing {
		rest, parts, found, err = r.policies.Read(policyTable(nil, true))
	}
	if err != nil || !found {
		return f, nil, false, err
	}
	for k, p := range parts {
		if k.class == 0 {
			f.Addrs[k.addr] = addressOf(p.list())
		}
	}
	// A class that allows nothing has no elements: that it is there, its pods say.
	class := func(n policy.Number) *policy.Class {
		if f.Classes[n] == nil {
			f.Classes[n] = &policy.Class{Number: n}
		}
		return f.Classes[n]
	}
	for _, a := range f.Addrs {
		for _, d := range policy.Directions {
			if n := a.Isolated[d]; n != 0 {
				class(n).Direction = d
			}
			if n := a.Tiers[d]; n != 0 {
				c := class(n)
				c.Direction, c.Tiers = d, true
			}
		}
	}
	for k, p := range parts {
		if k.class != 0 {
			c := class(k.class)
			for _, l := range p.list() {
				readElement(c, l)
			}
		}
	}
	return f, elements(rest).prefixes(ownPods), true, nil
}

// addressOf is the reverse of addressElements.
func addressOf(list []listed) (is policy.Address) {
	var first, behindTier [2]policy.Number
	for _, l := range list {
		c, isClass := classChainOf(l.Value)
		switch set := l.set[:len(l.set)-1]; { // the family is appended
		case set == identities && len(l.Value) == 4:
			is.Peer, is.Of = policy.Number(binary.NativeEndian.Uint32([]byte(l.Value))), l.Comment
		case set == judged:
			is.Own = true
			is.Pod.Namespace, is.Pod.Name, _ = strings.Cut(l.Comment, "/")
		case isClass && (set == isolatedIn || set == isolatedOut) && c.tiers:
			is.Tiers[c.Direction] = c.Number
		case isClass && (set == isolatedIn || set == isolatedOut):
			first[c.Direction], is.Audited[c.Direction] = c.Number, c.audit
		case isClass && (set == behindIn || set == behindOut):
			behindTier[c.Direction], is.Audited[c.Direction] = c.Number, c.audit
		}
	}
	for _, d := range policy.Directions {
		if is.Isolated[d] = first[d]; is.Tiers[d] != 0 {
			is.Isolated[d] = behindTier[d]
		}
	}
	return is
}

// readElement is the reverse of classElements.
func readElement(c *policy.Class, l listed) {
	key, end := []byte(l.Key), []byte(l.KeyEnd)
	if len(end) == 0 {
		end = key
	}
	if len(key) < 4 || len(end) != len(key) {
		return
	}
	peer := policy.Number(binary.NativeEndian.Uint32(key))
	key, end = key[4:], end[4:]
	g := policy.Grant{}
	switch l.Value {
	case Record{Denied, policy.Ingress}.chain(), Record{Denied, policy.Egress}.chain():
		g.Action = policy.Deny
	case behindChain(policy.Ingress), behindChain(policy.Egress):
		g.Action = policy.Pass
	}
	switch strings.TrimRight(l.set, "46") {
	case allowPeers, tierPeers, allowBlocks, tierBlocks:
		g.All = true
	default:
		if len(key) < 8 {
			return
		}
		g.Protocol, g.From, g.To = service.Protocol(key[0]), binary.BigEndian.Uint16(key[4:]), binary.BigEndian.Uint16(end[4:])
		key, end = key[8:], end[8:]
	}
	if len(key) == 0 {
		c.Allows = append(c.Allows, policy.Allow{Peer: peer, Grant: g})
		return
	}
	first, ok := netip.AddrFromSlice(key)
	last, alsoOK := netip.AddrFromSlice(end)
	if ok && alsoOK {
		c.Blocks = append(c.Blocks, policy.AllowBlock{First: first, Last: last, Grant: g})
	}
}
