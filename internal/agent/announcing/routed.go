package announcing

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// toRouters are the addresses that routers may send to this node, each once for every Service that has it; sorted.
func toRouters(f vip.Facts, verdicts []vip.Verdict) []bgpconf.ServiceAddress {
	here := map[netip.Addr]bool{}
	for _, v := range verdicts {
		here[v.Address] = v.Routed
	}
	inner := func(t vip.Target) bool {
		return slices.Contains(vip.Eligible(t.Addrs[0], []vip.Target{t}, f.Nodes), f.Node)
	}
	// All ClusterIPs of the policy Cluster are for the same nodes.
	anywhere := inner(vip.Target{Addrs: []netip.Addr{{}}})
	var list []bgpconf.ServiceAddress
	for _, l := range f.Balancers {
		add := func(addr netip.Addr, kind v1alpha1.BGPAddresses) {
			a := bgpconf.ServiceAddress{Addr: addr, Kind: kind, Service: l.Service, Labels: l.Labels}
			if pool := f.Pools.Of(addr); pool != nil {
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
