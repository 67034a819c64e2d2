package service

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/packet"
)

// partName is what hops call this part of the network.
const partName = "Services"

// AtConnect explains what the programs at connect() do: docs/design/connect.md.
type AtConnect struct {
	Held []Balanced // what the programs' map holds, sorted by key
	// Names are the Services by ID, since the kernel has only the IDs.
	Names map[uint32]Name
}

// Explain implements packet.Part.
func (a AtConnect) Explain(p packet.Packet) []packet.Hop {
	key := Key{Addr: p.Dst.Addr(), Protocol: Protocol(p.Protocol), Port: p.Dst.Port()}
	loopback := key.Addr.IsLoopback() || key.Addr.IsUnspecified() // the kernel connects both to loopback
	if loopback {
		key.Addr = loopbackOf(key.Addr.Is4())
	}
	i, found := slices.BinarySearchFunc(a.Held, key, func(b Balanced, k Key) int { return b.Compare(k) })
	if !found || p.Sender == packet.Unseen || loopback && p.Origin != packet.Node {
		return nil
	}
	b := a.Held[i]
	const hook = "connect()"
	switch {
	case b.PodsOnly && p.Origin == packet.Node:
		return []packet.Hop{packet.Passed(p, partName, hook, "the address is for pods, not for the node itself")}
	case key.Protocol == UDP && p.Sender == packet.Connected && key.Port != DNSPort && !loopback:
		return []packet.Hop{packet.Passed(p, partName, hook, "a UDP socket that connects could not be moved to another endpoint later")}
	}
	hop := packet.Hop{Part: partName, Hook: hook, Object: objectOf(a.Names[b.ID]), Rule: "the map fathom_services in /sys/fs/bpf/fathom/services"}
	if len(b.Endpoints) == 0 {
		hop.Verdict, hop.Why = packet.Reject, "no endpoint is ready"
		return []packet.Hop{hop}
	}
	hop.Verdict, hop.Why = packet.Translate, chosen(len(b.Endpoints), b.Affinity > 0)
	for _, e := range b.Endpoints {
		out := p
		out.Dst = e
		hop.Out = append(hop.Out, out)
	}
	return []packet.Hop{hop}
}

// ByRules explains what the rules for packets do at the hooks prerouting and output: docs/design/nftables.md.
type ByRules struct {
	Plan // what the rules hold, in the form of ByPacketOf
}

// Explain implements packet.Part.
func (r ByRules) Explain(p packet.Packet) []packet.Hop {
	hop := packet.Hop{Part: partName, Hook: "prerouting"}
	if p.Origin == packet.Node {
		hop.Hook = "output"
	} else if p.Dst.Addr().Is4() && (p.Dst.Addr().IsLoopback() || p.Src.Addr().IsLoopback()) {
		hop.Why, hop.Rule = "127.0.0.0/8 is for the node itself", "nft list chain inet "+Table+" check_prerouting"
		return []packet.Hop{hop}
	}
	f, found := r.find(p)
	if !found {
		return nil
	}
	hop.Object = objectOf(f.Service)
	rule := func(set string) string {
		return fmt.Sprintf("nft get element inet %s %s%d '{ %s . %s . %d }'", Table, set, inet.FamilyOf(f.Addr), f.Addr,
			strings.ToLower(f.Protocol.String()), f.Port)
	}
	if f.PodsOnly && p.Origin == packet.Node {
		pass := packet.Passed(p, partName, hop.Hook, "the address is for pods, not for the node itself")
		pass.Object, pass.Rule = hop.Object, rule("pods_only")
		return []packet.Hop{pass}
	}
	from := p.Src.Addr()
	if f.Sources != nil && !inet.Contains(f.Sources, from) {
		hop.Why, hop.Rule = fmt.Sprintf("loadBalancerSourceRanges do not include %s", from), rule("restricted")
		return []packet.Hop{hop}
	}
	backends, set := f.Inside, ""
	if p.Origin != packet.Node && !inet.Contains(r.OwnPods, from) {
		backends = f.Outside
		if f.Split() {
			set = "_outside"
		}
	}
	switch {
	case len(backends.Endpoints) > 0:
		hop.Verdict, hop.Why, hop.Rule = packet.Translate, chosen(len(backends.Endpoints), f.Affinity > 0), rule("services"+set)
		for _, e := range backends.Endpoints {
			out := p
			out.Dst, out.Translated = e, true
			hop.Out = append(hop.Out, out)
		}
	case backends.Drop:
		hop.Why, hop.Rule = "no endpoint on this node is ready, and its traffic policy is Local", rule("refused"+set)
	default:
		hop.Verdict, hop.Why, hop.Rule = packet.Reject, "no endpoint is ready", rule("refused"+set)
	}
	return []packet.Hop{hop}
}

// find returns the frontend that a packet reaches. A frontend with exactly its address takes precedence over a NodePort.
func (r ByRules) find(p packet.Packet) (Frontend, bool) {
	at := func(addr netip.Addr) (Frontend, bool) {
		key := Key{Addr: addr, Protocol: Protocol(p.Protocol), Port: p.Dst.Port()}
		i, found := slices.BinarySearchFunc(r.Frontends, key, func(f Frontend, k Key) int { return f.Compare(k) })
		if !found {
			return Frontend{}, false
		}
		return r.Frontends[i], true
	}
	to := p.Dst.Addr()
	if to.IsUnspecified() {
		return Frontend{}, false
	}
	if f, found := at(to); found {
		return f, true
	}
	own := to.Is4() && to.IsLoopback() && p.Origin == packet.Node
	switch {
	case !own && !slices.Contains(r.NodePortAddrs, to):
		return Frontend{}, false
	case to.Is4():
		return at(netip.IPv4Unspecified())
	}
	return at(netip.IPv6Unspecified())
}

// ByRulesAfter explains with whose source address a packet leaves that ByRules has translated.
type ByRulesAfter struct {
	Plan
	Local []netip.Addr // the node's own addresses
}

// Explain implements packet.Part.
func (r ByRulesAfter) Explain(p packet.Packet) []packet.Hop {
	const hook = "postrouting"
	from, to := p.Src.Addr(), p.Dst.Addr()
	if !p.Translated {
		return nil
	}
	hop := packet.Hop{Part: partName, Hook: hook, Verdict: packet.Translate, Rule: "nft list chain inet " + Table + " " + hook}
	switch {
	case p.Origin == packet.Node && slices.Contains(r.Local, to):
		return nil // it does not leave
	case from == to && inet.Contains(r.OwnPods, from):
		hop.Why = "a pod that meets itself would see its own address, and answer itself"
	case from.Is4() && from.IsLoopback():
		hop.Why = "127.0.0.0/8 is for the node itself"
	case !inet.Contains(r.OwnPods, from) && !inet.Contains(r.OwnPods, to):
		hop.Why = "the answer has to come back by this node"
	default:
		return []packet.Hop{packet.Passed(p, partName, hook, "the answer comes by this node anyway")}
	}
	out := p
	out.Src = netip.AddrPort{}
	hop.Out = []packet.Packet{out}
	return []packet.Hop{hop}
}

func objectOf(n Name) string {
	if n == (Name{}) {
		return ""
	}
	return "Service " + n.String()
}

func chosen(endpoints int, affinity bool) string {
	switch {
	case endpoints == 1:
		return "its only endpoint"
	case affinity:
		return fmt.Sprintf("one of %d endpoints, the client's own if it has one (sessionAffinity)", endpoints)
	}
	return fmt.Sprintf("one of %d endpoints, by chance", endpoints)
}
