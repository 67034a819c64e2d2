package podnet

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/packet"
)

// MasqueradeTable is the nftables table that gives packets of pods to the world outside their node's address.
const MasqueradeTable = "fathom-masquerade"

// Explain implements packet.Part: what a node's rules do with a packet that leaves it.
func (m Masquerade) Explain(p packet.Packet) []packet.Hop {
	const part, hook = "masquerade", "postrouting"
	from, to := p.Src.Addr(), p.Dst.Addr()
	switch {
	case !inet.Contains(m.Sources, from):
		return nil
	case inet.Contains(m.Pods, to):
		return []packet.Hop{packet.Passed(p, part, hook, "pods see each other's own addresses")}
	case slices.Contains(m.Nodes, to):
		return []packet.Hop{packet.Passed(p, part, hook, "nodes see pods' own addresses")}
	case inet.Contains(m.Others, to):
		return []packet.Hop{packet.Passed(p, part, hook, "nonMasqueradeCIDRs includes it")}
	}
	out := p
	out.Src = netip.AddrPort{}
	return []packet.Hop{{Part: part, Hook: hook, Verdict: packet.Translate, Why: "outside of the cluster nobody has a route to a pod: it leaves with the node's address",
		Rule: "nft list chain inet " + MasqueradeTable + " " + hook, Out: []packet.Packet{out}}}
}

// FastPath is what programs on the node's devices do to pods' packets before anything else: docs/design/fastpath.md.
type FastPath struct {
	// Off says why there is none, if there is none.
	Off string
	// Pods are this node's pods, by address: the node's ends of their devices.
	Pods map[netip.Addr]string
	// Slow are pods whose packets take the stack, and why.
	Slow map[netip.Addr]string
	// Judged are pods that policies isolate, and of which the fast path knows what they allow of TCP. What it does not allow takes the stack.
	Judged []netip.Addr
	Ways
}

// Explain implements packet.Part. Of a packet from elsewhere it takes for granted that it came by one of Devices.
func (f FastPath) Explain(p packet.Packet) []packet.Hop {
	const part, hook = "fast path", "tcx ingress"
	from, to := p.Src.Addr(), p.Dst.Addr()
	device, here := f.Pods[to]
	pass := func(why string) []packet.Hop { return []packet.Hop{packet.Passed(p, part, hook, why)} }
	judged := slices.Contains(f.Judged, from) || slices.Contains(f.Judged, to)
	hop := packet.Hop{Part: part, Hook: hook}
	var way Remote // between this node and that of a pod elsewhere
	switch {
	case p.Origin == packet.Node:
		return nil // no program sees it leave
	case p.Origin == packet.Elsewhere && !here:
		return nil
	case p.Origin == packet.Elsewhere:
		way = f.to(from)
	case from == to:
		return []packet.Hop{{Part: "pod", Hook: "routing", Verdict: packet.Redirect, Why: "it stays within the pod", Device: "lo"}}
	default:
		if _, own := f.Pods[from]; !own {
			hop.Why, hop.Rule = "it is not from the pod's own address", "the map fathom_pods in /sys/fs/bpf/fathom"
			return []packet.Hop{hop}
		}
		way = f.to(to)
	}
	switch {
	case f.Off != "":
		return pass("there is none: " + f.Off)
	case p.Origin == packet.Pod && !here && way.Device == "":
		return pass("it is not to a pod")
	case p.Origin == packet.Elsewhere && way.Device == "":
		return pass("it is not from a pod")
	case f.Slow[from] != "":
		return pass("the sender's packets take the stack: " + f.Slow[from])
	case f.Slow[to] != "":
		return pass("the receiver's packets take the stack: " + f.Slow[to])
	case p.Protocol != tcp && p.Protocol != udp:
		return pass("it is neither TCP nor UDP")
	case p.Protocol != tcp && judged:
		return pass("policies isolate one of the pods, and it is not TCP")
	case p.Translated:
		return pass("connection tracking knows it")
	}
	hop.Verdict = packet.Redirect
	switch {
	case !here:
		hop.Why, hop.Device, hop.Rule = "to a pod of another node, by "+way.Via.String(), way.Device, "the map fathom_remotes in /sys/fs/bpf/fathom"
	case p.Origin == packet.Pod:
		hop.Why, hop.Device, hop.Rule = "to a pod of this node", device, "the map fathom_pods in /sys/fs/bpf/fathom"
	default:
		hop.Why, hop.Device, hop.Rule = "from a pod of another node", device, "the map fathom_pods in /sys/fs/bpf/fathom"
	}
	if judged {
		hop.Why += ", if policies allow it: else the stack's rules drop it"
	}
	return []packet.Hop{hop}
}

// The protocols that the fast path is for.
const (
	tcp = 6
	udp = 17
)

// to returns the way to an address, of the longest prefix; the zero value if there is none.
func (w Ways) to(a netip.Addr) Remote {
	var best Remote
	for _, r := range w.Remotes {
		if r.To.Contains(a) && (!best.To.IsValid() || r.To.Bits() > best.To.Bits()) {
			best = r
		}
	}
	return best
}
