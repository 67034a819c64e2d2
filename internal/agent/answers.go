package agent

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
)

// answerFacts are what it follows from which addresses a node answers for.
type answerFacts struct {
	node      string
	pools     vip.Pools
	balancers []service.LoadBalanced
	nodes     []answerNode
	segments  []announce.Segment
}

type answerNode struct {
	vip.Node
	addrs []netip.Addr
	away  bool // its agent is, and its kernel does what it was told
}

// judge says of each load balancer's address and external IP who answers for it on this node's segments, and whether
// routers may send it to this node; sorted by address.
func (f answerFacts) judge() []vip.Verdict {
	targets := map[netip.Addr][]vip.Target{}
	for _, l := range f.balancers {
		for _, addr := range slices.Concat(l.Addrs, l.ExternalIPs) {
			// An address of no pool is another controller's.
			if f.pools.Contains(addr) {
				targets[addr] = append(targets[addr], l)
			}
		}
	}
	nodes := f.all()
	near := map[string]map[string]bool{} // nodes on the segments of a device
	verdicts := make([]vip.Verdict, 0, len(targets))
	for _, addr := range slices.SortedFunc(maps.Keys(targets), netip.Addr.Compare) {
		v := vip.Verdict{Address: addr, Devices: announce.On(addr, f.segments)}
		v.Eligible = vip.Eligible(addr, targets[addr], nodes)
		v.Routed = slices.Contains(v.Eligible, f.node)
		if len(v.Devices) > 0 {
			device := v.Devices[0]
			if near[device] == nil {
				near[device] = f.near(device)
			}
			here := slices.DeleteFunc(slices.Clone(nodes), func(n vip.Node) bool { return !near[device][n.Name] })
			v.Announcer = vip.Announcer(addr, vip.Eligible(addr, targets[addr], here))
			v.Answers = v.Announcer == f.node
			v.StandIn = f.standIn(addr, v.Announcer, near[device])
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// standIn is the node that answers in place of one whose agent is away: any that is on the segment will do, since it gets
// none of the packets.
func (f answerFacts) standIn(addr netip.Addr, announcer string, near map[string]bool) string {
	away := false
	var others []string
	for _, n := range f.nodes {
		switch {
		case n.Name == announcer:
			away = n.away
		case n.Alive && !n.away && near[n.Name]:
			others = append(others, n.Name)
		}
	}
	if !away {
		return ""
	}
	return vip.Announcer(addr, others)
}

// all are the nodes, without where they are.
func (f answerFacts) all() []vip.Node {
	nodes := make([]vip.Node, 0, len(f.nodes))
	for _, n := range f.nodes {
		nodes = append(nodes, n.Node)
	}
	return nodes
}

// answered are the addresses that the node answers for on its segments.
func answered(verdicts []vip.Verdict) []netip.Addr {
	addrs := []netip.Addr{}
	for _, v := range verdicts {
		if v.Answers {
			addrs = append(addrs, v.Address)
		}
	}
	return addrs
}

// routed are the addresses that routers may send to this node, each once for every Service that has it; sorted.
func (f answerFacts) routed(verdicts []vip.Verdict) []bgpconf.ServiceAddress {
	here := map[netip.Addr]bool{}
	for _, v := range verdicts {
		here[v.Address] = v.Routed
	}
	nodes := f.all()
	inner := func(t vip.Target) bool {
		return slices.Contains(vip.Eligible(t.Addrs[0], []vip.Target{t}, nodes), f.node)
	}
	// All ClusterIPs of the policy Cluster are for the same nodes.
	anywhere := inner(vip.Target{Addrs: []netip.Addr{{}}})
	var list []bgpconf.ServiceAddress
	for _, l := range f.balancers {
		add := func(addr netip.Addr, kind v1alpha1.BGPAddresses) {
			a := bgpconf.ServiceAddress{Addr: addr, Kind: kind, Service: l.Service, Labels: l.Labels}
			if pool := f.pools.Of(addr); pool != nil {
				a.Pool, a.PoolLabels = pool.Name, pool.Labels()
			}
			list = append(list, a)
		}
		for _, addr := range l.Addrs {
			if here[addr] {
				add(addr, v1alpha1.BGPLoadBalancerIP)
			}
		}
		for _, addr := range l.ExternalIPs {
			if here[addr] {
				add(addr, v1alpha1.BGPExternalIP)
			}
		}
		if len(l.ClusterIPs) > 0 && (!l.LocalInside && anywhere || l.LocalInside && inner(vip.Target{Addrs: l.ClusterIPs, Local: true, Nodes: l.NodesInside})) {
			for _, addr := range l.ClusterIPs {
				add(addr, v1alpha1.BGPClusterIP)
			}
		}
	}
	slices.SortStableFunc(list, func(a, b bgpconf.ServiceAddress) int { return a.Addr.Compare(b.Addr) })
	return list
}

// near are the nodes that are on a segment of a device, this one among them. An IPv6 segment is that of the nodes' IPv4
// addresses, too, if it is the same device: a Node may have addresses of one family alone.
func (f answerFacts) near(device string) map[string]bool {
	on := map[string]bool{f.node: true}
	for _, n := range f.nodes {
		for _, s := range f.segments {
			if s.Device == device && slices.ContainsFunc(n.addrs, s.Prefix.Contains) {
				on[n.Name] = true
			}
		}
	}
	return on
}
