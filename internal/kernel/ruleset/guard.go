package ruleset

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// GuardTable is the table that stops pods from spoofing source addresses: docs/design/podnet.md, "Who may send as whom".
const GuardTable = "fathom-guard"

// The sets of the table. Each exists once for IPv4 and once for IPv6, with 4 or 6 appended. guardSenders exists once for
// each senders.
const (
	guardNodes     = "nodes"
	guardOwn       = "tunnel_addrs"
	guardSenders   = "tunnel_senders"
	guardOutside   = "outside"
	guardCluster   = "cluster"
	guardLinkLocal = "link_local"
	guardOpen      = "link_local_open"
)

// PodGroup is the device group of pods' devices. A test compares it with podlink.Group, since this package does not import link.
const PodGroup = 252

// senders are the tunnel's senders of one outer family whose ranges have one family and one length.
type senders struct {
	outer, inner inet.Family
	bits         int // of the ranges
}

func (s senders) name() string {
	return fmt.Sprintf("%s%d_%d_%d", guardSenders, s.outer, s.inner, s.bits)
}

func sendersOf(s podnet.Sender) senders {
	return senders{inet.FamilyOf(s.Node), inet.FamilyOf(s.Range.Addr()), s.Range.Bits()}
}

// kindsOf returns the senders of a guard, the largest ranges first: pods send more packets than nodes do.
func kindsOf(g podnet.Guard) []senders {
	var all []senders
	for _, s := range g.Senders {
		all = append(all, sendersOf(s))
	}
	slices.SortFunc(all, func(a, b senders) int {
		return cmp.Or(cmp.Compare(a.outer, b.outer), cmp.Compare(a.inner, b.inner), cmp.Compare(a.bits, b.bits))
	})
	return slices.Compact(all)
}

// SetGuard makes the kernel enforce g, and returns the number of elements that it changed.
func (r *Ruleset) SetGuard(g podnet.Guard) (diff.Count, error) {
	return r.set(guardTable(g))
}

// Guard reads back what SetGuard set for a guard like this one. Port, VNI and the lengths of the senders' ranges are in the
// rules, so they have to be the same. A table that is missing, or whose rules are not ours, yields the zero value.
func (r *Ruleset) Guard(like podnet.Guard) (podnet.Guard, error) {
	have, found, err := r.read(guardTable(like))
	if !found || err != nil {
		return podnet.Guard{}, err
	}
	g := podnet.Guard{Port: like.Port, VNI: like.VNI, Nodes: have.addrs(guardNodes), Own: have.addrs(guardOwn),
		Outside: have.prefixes(guardOutside), Cluster: have.prefixes(guardCluster),
		LinkLocal: have.prefixes(guardLinkLocal), Open: have.prefixes(guardOpen)}
	for _, s := range kindsOf(like) {
		for _, e := range have[s.name()] {
			sender, ok := s.sender(e)
			if !ok {
				return podnet.Guard{}, nil
			}
			g.Senders = append(g.Senders, sender)
		}
	}
	slices.SortStableFunc(g.Senders, func(a, b podnet.Sender) int {
		return cmp.Or(a.Node.Compare(b.Node), a.Range.Addr().Compare(b.Range.Addr()))
	})
	return g, nil
}

// elements returns the set elements for those senders of a guard that are of this kind.
func (s senders) elements(g podnet.Guard) (list []nft.Element) {
	var key []byte
	for _, x := range g.Senders {
		if sendersOf(x) == s {
			key = nft.AppendAddr(nft.AppendAddr(key[:0], x.Node), x.Range.Addr())
			list = append(list, nft.Element{Key: string(key)})
		}
	}
	return sorted(list)
}

// sender decodes an element of the set.
func (s senders) sender(e nft.Element) (podnet.Sender, bool) {
	n := words(s.outer) * 4
	if len(e.Key) != n+words(s.inner)*4 {
		return podnet.Sender{}, false
	}
	node, _ := netip.AddrFromSlice([]byte(e.Key[:n]))
	first, _ := netip.AddrFromSlice([]byte(e.Key[n:]))
	p := netip.PrefixFrom(first, s.bits)
	return podnet.Sender{Node: node, Range: p}, p == p.Masked()
}

// The fields of a VXLAN packet behind the UDP header (RFC 7348, section 5), in bytes from the start of that header.
// nftables has names for them since Linux 6.2 only, and the rules have to work on 5.14.
const (
	vxlanVNI       = 8 + 4
	vxlanEtherType = 8 + 8 + 12
	vxlanInner     = 8 + 8 + 14
)

func guardTable(g podnet.Guard) nft.Table {
	kinds := kindsOf(g)
	t := nft.Table{Name: GuardTable, Variant: fmt.Sprintf("port %d, VNI %d, senders %v", g.Port, g.VNI, kinds), Elements: elements{}}
	for _, f := range inet.Families {
		t.Sets = append(t.Sets,
			addrSet(guardNodes, f, "every node"),
			addrSet(guardOwn, f, "this node, where its tunnel receives"),
			prefixSet(guardOutside, f, "sources outside of the cluster that nodes may hand on"),
			prefixSet(guardCluster, f, "the cluster's, which are not outside"),
			prefixSet(guardLinkLocal, f, "pods' packets are not forwarded there"),
			prefixSet(guardOpen, f, "but they are there"),
		)
		t.Elements[named(guardNodes, f)], t.Elements[named(guardOwn, f)] = ofAddrs(g.Nodes, f), ofAddrs(g.Own, f)
		t.Elements[named(guardOutside, f)], t.Elements[named(guardCluster, f)] = ofPrefixes(g.Outside, f), ofPrefixes(g.Cluster, f)
		t.Elements[named(guardLinkLocal, f)], t.Elements[named(guardOpen, f)] = ofPrefixes(g.LinkLocal, f), ofPrefixes(g.Open, f)
	}
	for _, s := range kinds {
		t.Sets = append(t.Sets, &nft.Set{Name: s.name(), Comment: "who sends by the tunnel, and from where",
			Key: nftables.MustConcatSetType(addrType(s.outer), addrType(s.inner))})
		t.Elements[s.name()] = s.elements(g)
	}
	t.Chains = slices.Concat(guardSource(g.Port), guardForward(g.Port), guardTunnel(g.Port, g.VNI, kinds))
	return t
}

// guardSource returns the chains at the first hooks of prerouting and output.
func guardSource(port uint16) []nft.Chain {
	// The chain runs before connection tracking, so that spoofed packets create no entry. It covers both families, although
	// rp_filter does the same for IPv4: the kernel takes the greater of a device's value and that of "all", and many
	// distributions set the latter to 2, which accepts any source that has a route.
	pre := nft.Hooked("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw)
	pre.Add("a pod sends from its own address: that to which there is a route by its device", fromPod(), []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)}}, dropped())
	out := nft.Hooked("output", nftables.ChainTypeFilter, nftables.ChainHookOutput, *nftables.ChainPriorityRaw)
	// Untracked packets are not translated, so no host port and no external address of a Service can capture the tunnel's
	// packets. It also saves a conntrack look-up for each packet of a flow that has one direction only. The chain to_tunnel
	// checks the sender, not these.
	from, to := nft.Chain{Name: "untracked_from_tunnel"}, nft.Chain{Name: "untracked_to_tunnel"}
	pre.Add("to this node's tunnel, perhaps", toPort(port), jump(from.Name))
	out.Add("to another node's tunnel, perhaps", toPort(port), jump(to.Name))
	for _, f := range inet.Families {
		const why = "the tunnel's packets are nobody else's to translate"
		from.Add(why, isFamily(f), isIn(destinationOf(f), named(guardOwn, f)), []expr.Any{&expr.Notrack{}}, verdict(expr.VerdictAccept))
		to.Add(why, isFamily(f), isIn(destinationOf(f), named(guardNodes, f)), []expr.Any{&expr.Notrack{}}, verdict(expr.VerdictAccept))
	}
	return []nft.Chain{pre, out, from, to}
}

// guardForward returns the chains for forwarded packets. Destinations are the final ones here: Services and host ports are
// translated already.
func guardForward(port uint16) []nft.Chain {
	forward := nft.Hooked("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter)
	pods := nft.Chain{Name: "forward_from_pod"}
	tunnels := nft.Chain{Name: "forward_to_tunnel"}
	forward.Add("to somebody's tunnel, perhaps", toPort(port), jump(tunnels.Name))
	forward.Add("from a pod", fromPod(), jump(pods.Name))
	for _, f := range inet.Families {
		// Such a packet would leave with this node's address, and the other node would take it for this node's tunnel.
		toNode := slices.Concat(isFamily(f), isIn(destinationOf(f), named(guardNodes, f)))
		tunnels.Add("no pod sends to a node's tunnel", fromPod(), toNode, dropped())
		tunnels.Add("nothing is translated to a node's tunnel", translated(), toNode, dropped())
		pods.Add("link-local addresses and clouds' metadata are the node's alone", isFamily(f),
			isIn(destinationOf(f), named(guardLinkLocal, f)), isNotIn(destinationOf(f), named(guardOpen, f)), []expr.Any{
				// This rule rejects where others drop: a client that asks for metadata goes on at once instead of waiting.
				&expr.Counter{}, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}})
	}
	return []nft.Chain{forward, pods, tunnels}
}

// guardTunnel returns the chains for packets that arrive at this node's tunnel. They run before decapsulation: afterwards
// nothing tells which node an inner packet came from, and the fast path redirects it before any chain.
func guardTunnel(port uint16, vni uint32, kinds []senders) []nft.Chain {
	input := nft.Hooked("input", nftables.ChainTypeFilter, nftables.ChainHookInput, *nftables.ChainPriorityFilter)
	tunnel := nft.Chain{Name: "to_tunnel"}
	input.Add("to the tunnel", toPort(port), jump(tunnel.Name))
	// This rule comes before those of the senders, since a pod's packet to another node's port arrives with its own node's
	// address. Untracked packets fail its first match.
	tunnel.Add("nothing is translated to a node's tunnel", translated(), isVNI(expr.CmpOpEq, vni), dropped())
	// Nearly all packets match here, so these rules come next. A pod cannot match them, since it cannot send from a node's address.
	for _, s := range kinds {
		tunnel.Add("a node sends from its own addresses and its pods'", isFamily(s.outer), isInner(s.inner),
			[]expr.Any{at(sourceOf(s.outer), 0), at(innerSource(s.inner), words(s.outer))}, masked(words(s.outer), s),
			[]expr.Any{&expr.Lookup{SourceRegister: reg(0), SetName: s.name()}}, verdict(expr.VerdictAccept))
	}
	tunnel.Add("no pod sends to a node's tunnel", fromPod(), dropped())
	tunnel.Add("another tunnel that shares the port", isVNI(expr.CmpOpNeq, vni), verdict(expr.VerdictReturn))
	for _, f := range inet.Families {
		tunnel.Add("nodes send to the address that this one has in the API", isFamily(f), isNotIn(destinationOf(f), named(guardOwn, f)), dropped())
	}
	for _, outer := range inet.Families {
		for _, inner := range inet.Families {
			tunnel.Add("or hands on what comes from outside", isFamily(outer), isIn(sourceOf(outer), named(guardNodes, outer)), isInner(inner),
				isIn(innerSource(inner), named(guardOutside, inner)), isNotIn(innerSource(inner), named(guardCluster, inner)), verdict(expr.VerdictAccept))
		}
	}
	tunnel.Add("all else is from no node, or from a source that is another's", dropped())
	return []nft.Chain{input, tunnel}
}

func fromPod() []expr.Any { return isPods(expr.CmpOpEq) }

// isPods compares the group of the input device with that of pods' devices.
func isPods(op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFGROUP, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: binary.NativeEndian.AppendUint32(nil, PodGroup)}}
}

// toPort matches UDP to a port. Packets of other protocols fail its first comparison.
func toPort(port uint16) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)}}
}

// translated matches packets whose destination was translated.
func translated() []expr.Any {
	const destinationNAT = 1 << 5 // IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h
	return []expr.Any{&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, destinationNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)}}
}

// isVNI compares the VNI of a VXLAN packet.
func isVNI(op expr.CmpOp, vni uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: vxlanVNI, Len: 3},
		&expr.Cmp{Op: op, Register: 1, Data: binary.BigEndian.AppendUint32(nil, vni)[1:]}}
}

// isInner matches VXLAN packets whose inner packet is of a family.
func isInner(f inet.Family) []expr.Any {
	kind := uint16(unix.ETH_P_IP)
	if f == inet.IPv6 {
		kind = unix.ETH_P_IPV6
	}
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: vxlanEtherType, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, kind)}}
}

func innerSource(f inet.Family) *expr.Payload {
	p := sourceOf(f)
	p.Base, p.Offset = expr.PayloadBaseTransportHeader, p.Offset+vxlanInner
	return p
}

// masked sets the address in a register to the first address of its range.
func masked(word int, s senders) []expr.Any {
	size := 4 * words(s.inner)
	if s.bits == 8*size {
		return nil
	}
	return []expr.Any{maskOf(s.inner, s.bits, reg(word))}
}
