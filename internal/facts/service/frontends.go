package service

import (
	"net/netip"
	"slices"
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Node is the node that frontends are worked out for.
type Node struct {
	Name  string
	Zone  string // the label topology.kubernetes.io/zone; empty is unknown
	Addrs []netip.Addr
}

// NodeOf takes out of a Node of the API what matters to Services.
func NodeOf(n *corev1.Node) Node {
	node := Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone]}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP && a.Type != corev1.NodeExternalIP {
			continue
		}
		if addr, err := ParseAddr(a.Address); err == nil && !slices.Contains(node.Addrs, addr) {
			node.Addrs = append(node.Addrs, addr)
		}
	}
	slices.SortFunc(node.Addrs, netip.Addr.Compare)
	return node
}

// HealthCheck is what a load balancer asks a node about a Service: a Service of type LoadBalancer with
// externalTrafficPolicy: Local has a port at which every node says how many ready endpoints it has itself.
type HealthCheck struct {
	Service        types.NamespacedName
	Port           uint16
	LocalEndpoints int
}

// Frontends returns what a Service is on a node, sorted by keys. Of the slices those of the Service count. What other
// Services claim is not known here; Model knows it.
func Frontends(svc *corev1.Service, all []*discoveryv1.EndpointSlice, node Node) []Frontend {
	s := readService(svc)
	return s.frontends(readSlices(s.name, all), placeOf(node))
}

// readSlices returns the slices of one Service, sorted by name.
func readSlices(name types.NamespacedName, all []*discoveryv1.EndpointSlice) []*slice {
	var own []*slice
	for _, es := range all {
		if of, ok := serviceOf(es); ok && of == name {
			own = append(own, readSlice(es))
		}
	}
	slices.SortFunc(own, func(a, b *slice) int { return strings.Compare(a.name, b.name) })
	return own
}

// place is a node, as it is compared with endpoints.
type place struct {
	node       unique.Handle[string]
	name, zone string
	addrs      []netip.Addr
}

func placeOf(n Node) place {
	p := place{name: n.Name, zone: n.Zone, addrs: n.Addrs}
	if n.Name != "" {
		p.node = unique.Make(n.Name)
	}
	return p
}

// holds says whether an endpoint is on the node. One that names no node is on none, and neither is any if the node
// is not known.
func (p place) holds(e *endpoint) bool { return p.name != "" && e.node == p.node }

// frontends is Frontends, of what is kept.
func (s *service) frontends(own []*slice, at place) []Frontend {
	if len(s.addrs) == 0 || len(s.ports) == 0 {
		return nil
	}
	all := make([]Frontend, 0, len(s.addrs)*len(s.ports))
	for _, p := range s.ports {
		var chosen [2]choice
		var known [2]bool
		for _, a := range s.addrs {
			f := Frontend{Key: Key{a.addr, p.protocol, p.number}, Service: s.name, PortName: p.name, Kind: a.kind, Affinity: s.affinity}
			if a.kind == NodePort {
				f.Port = p.nodePort
			}
			if f.Port == 0 {
				continue
			}
			family := familyOf(a.addr)
			if !known[family] {
				chosen[family] = choose(candidates(own, p, family), at, s.local[inside] || s.local[outside])
				known[family] = true
			}
			f.Inside, f.Outside = s.backends(a.kind, chosen[family])
			if a.kind == LoadBalancer {
				f.Sources = s.sourcesAt(at, family)
			}
			all = append(all, f)
		}
	}
	// A Service may name an address twice, once as an external IP and once as its load balancer's. The kinds come in the
	// order of addrs, so the one that says more about who may come stays.
	slices.SortStableFunc(all, func(a, b Frontend) int { return a.Compare(b.Key) })
	return slices.CompactFunc(all, func(a, b Frontend) bool { return a.Key == b.Key })
}

// backends returns to where a frontend of a kind sends what comes from inside and from outside. A pod that means a
// Service by its external address is served as if no load balancer were between, by any endpoint: the policy Local is
// there to keep a client's address, and a pod's is kept.
func (s *service) backends(k Kind, c choice) (in, out Backends) {
	switch {
	case k == ClusterIP && s.local[inside]:
		return c.local, c.local
	case k != ClusterIP && s.local[outside]:
		return c.cluster, c.local
	}
	return c.cluster, c.cluster
}

// sourcesAt are who may come to the Service's load balancer's addresses on a node. Where such an address is an interface's
// of the node, as some load balancers do it, what the node sends there comes from that very address: it may come if the
// node itself may, as kube-proxy has it.
func (s *service) sourcesAt(at place, family int) []netip.Prefix {
	ranges := s.sources[family]
	contain := func(a netip.Addr) bool {
		return slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	if !slices.ContainsFunc(at.addrs, contain) {
		return ranges
	}
	all := slices.Clone(ranges)
	for _, a := range s.addrs {
		if a.kind == LoadBalancer && familyOf(a.addr) == family && !contain(a.addr) {
			all = append(all, netip.PrefixFrom(a.addr, a.addr.BitLen()))
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// healthCheck says whether the Service has one, and what the node answers. Endpoints that terminate do not count,
// though they serve while there are no others: a load balancer is to go elsewhere.
func (s *service) healthCheck(own []*slice, at place) (HealthCheck, bool) {
	if s.healthPort == 0 {
		return HealthCheck{}, false
	}
	var ready [2][]netip.Addr
	for _, es := range own {
		if len(es.ports) == 0 || !s.serves[es.family] {
			continue
		}
		for i := range es.endpoints {
			if e := &es.endpoints[i]; e.ready && at.holds(e) && !slices.Contains(ready[es.family], e.addr) {
				ready[es.family] = append(ready[es.family], e.addr)
			}
		}
	}
	// A pod of both families is one endpoint.
	return HealthCheck{s.name, s.healthPort, max(len(ready[0]), len(ready[1]))}, true
}
