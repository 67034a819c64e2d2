package podnet

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Guard says what a node refuses because whoever sends it would pass for somebody else, or reach what is the node's
// alone. What does not change with the cluster is not here but in the rules: a pod sends from its own address only, and
// no pod sends to a tunnel.
type Guard struct {
	// Port and VNI are the tunnel's, on every node of the cluster.
	Port uint16
	VNI  uint32
	// Nodes are the addresses of all nodes: what is for the tunnel of one of them comes from a node.
	Nodes []netip.Addr
	// Own are the addresses of this node that its tunnel receives at. There are none without a tunnel, as there are
	// none of Senders, Cluster and Outside.
	Own []netip.Addr
	// Senders say which sources a node may send from by the tunnel.
	Senders []Sender
	// Outside are sources outside of the cluster that any node may send from, as a router does: those that see pods'
	// own addresses may answer by way of any node. An address in Cluster is never one of them.
	Outside []netip.Prefix
	Cluster []netip.Prefix
	// LinkLocal are destinations that pods' packets are not forwarded to; Open are exceptions to them.
	LinkLocal, Open []netip.Prefix
}

// Sender is a range of sources that the node with an address may send from by the tunnel.
type Sender struct {
	Node  netip.Addr
	Range netip.Prefix
}

func (s Sender) String() string { return fmt.Sprintf("%s from %s", s.Range, s.Node) }

// Metadata is where clouds answer with an instance's credentials, to whoever can send to it from the instance.
var Metadata = []netip.Prefix{
	netip.MustParsePrefix("169.254.169.254/32"),
	netip.MustParsePrefix("fd00:ec2::254/128"), // of Amazon's
	netip.MustParsePrefix("fd20:ce::254/128"),  // of Google's
}

// notForwarded are link-local addresses, which routers do not forward to (RFC 3927, section 7; RFC 4291, section 2.5.6):
// a node that does makes its pods neighbours on its own segment. Metadata has addresses outside of those, too.
var notForwarded = append([]netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("fe80::/10"),
}, Metadata[1:]...)

// guard plans what the node refuses. underlay is the family of the tunnel's outer packets.
func (p *planner) guard(me *member, members []*member, tunnel *Tunnel, underlay inet.Family) Guard {
	g := Guard{Port: p.config.Port, VNI: p.config.VNI, LinkLocal: inet.Disjoint(notForwarded), Open: inet.Disjoint(p.config.LinkLocal)}
	for _, m := range members {
		g.Nodes = append(g.Nodes, m.addrs...)
	}
	g.Nodes = sortedAddrs(g.Nodes)
	if tunnel == nil {
		return g
	}
	for _, m := range members {
		for _, a := range m.addrs {
			switch {
			case inet.FamilyOf(a) != underlay:
			case m == me:
				g.Own = append(g.Own, a)
			case !slices.Contains(me.addrs, a): // else it claims to be this node: reported already
				g.Senders = append(g.Senders, m.sendersAt(a)...)
			}
		}
	}
	if !tunnel.Local.IsValid() { // the node's address is on no device: others' packets come to one that is
		for _, i := range p.underlay {
			for _, prefix := range i.Addrs {
				if inet.FamilyOf(prefix.Addr()) == underlay {
					g.Own = append(g.Own, prefix.Addr())
				}
			}
		}
	}
	g.Own = sortedAddrs(g.Own)
	slices.SortFunc(g.Senders, compareSenders)
	g.Senders = slices.Compact(g.Senders)
	g.Outside, g.Cluster = p.outside(members)
	return g
}

// sendersAt returns what a node may send from, with one of its addresses around it: its pods' addresses, which include
// that of its tunnel, and its own, with which it answers who has asked there.
func (m *member) sendersAt(node netip.Addr) []Sender {
	list := make([]Sender, 0, len(m.podCIDRs)+len(m.addrs))
	for _, c := range m.podCIDRs {
		list = append(list, Sender{node, c})
	}
	for _, a := range m.addrs {
		list = append(list, Sender{node, netip.PrefixFrom(a, a.BitLen())})
	}
	return list
}

// outside returns what sees pods' own addresses and is none of the cluster's, and what is the cluster's.
func (p *planner) outside(members []*member) (outside, cluster []netip.Prefix) {
	outside = slices.Clone(p.config.NonMasquerade)
	if p.config.NoMasquerade4 {
		outside = append(outside, netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	if p.config.NoMasquerade6 {
		outside = append(outside, netip.PrefixFrom(netip.IPv6Unspecified(), 0))
	}
	if len(outside) == 0 {
		return nil, nil
	}
	cluster = slices.Clone(p.config.PodRanges)
	for _, m := range members {
		cluster = append(cluster, m.podCIDRs...)
		for _, a := range m.addrs {
			cluster = append(cluster, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return inet.Disjoint(outside), inet.Disjoint(cluster)
}

func compareSenders(a, b Sender) int {
	if c := a.Node.Compare(b.Node); c != 0 {
		return c
	}
	return a.Range.Compare(b.Range)
}

func sortedAddrs(list []netip.Addr) []netip.Addr {
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}

func (g Guard) String() string {
	if g.Port == 0 {
		return "" // there is none
	}
	var b strings.Builder
	fmt.Fprintf(&b, "guard tunnel port %d vni %d\n", g.Port, g.VNI)
	lines(&b, "guard node", g.Nodes)
	lines(&b, "guard receive at", g.Own)
	lines(&b, "guard receive", g.Senders)
	lines(&b, "guard receive from outside", g.Outside)
	lines(&b, "guard not outside", g.Cluster)
	lines(&b, "guard not forwarded to", g.LinkLocal)
	lines(&b, "guard but forwarded to", g.Open)
	return b.String()
}

func lines[T fmt.Stringer](b *strings.Builder, what string, list []T) {
	for _, x := range list {
		fmt.Fprintf(b, "%s %s\n", what, x)
	}
}

// guard tells what of a node's guard its kernel does not hold. A kernel without Port has none at all.
func (d *differ) guard(want, have Guard) {
	if want.Port != have.Port || want.VNI != have.VNI {
		d.add("guard: pods may pass for others: the table of rules is missing, or is another one")
		return
	}
	set(d, "guard: node", want.Nodes, have.Nodes)
	set(d, "guard: address of the tunnel", want.Own, have.Own)
	set(d, "guard: sender", want.Senders, have.Senders)
	set(d, "guard: range outside", want.Outside, have.Outside)
	set(d, "guard: range of the cluster", want.Cluster, have.Cluster)
	set(d, "guard: closed range", want.LinkLocal, have.LinkLocal)
	set(d, "guard: open range", want.Open, have.Open)
}
