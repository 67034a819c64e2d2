package service

import (
	"net/netip"
	"slices"
	"strings"
	"unique"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Node is the node that frontends are worked out for.
type Node struct {
	Name  string
	Zone  string // the label topology.kubernetes.io/zone; empty is unknown
	Addrs []netip.Addr
}

// HealthCheck is what a load balancer asks a node about a Service: a Service of type LoadBalancer with
// externalTrafficPolicy: Local has a port at which every node says how many ready endpoints it has itself.
type HealthCheck struct {
	Service        Name
	Port           uint16
	LocalEndpoints int
}

// Frontends returns what a Service is on a node, sorted by keys. Of the slices those of the Service count. What other
// Services claim is not known here; Model knows it.
func Frontends(s *Service, all []*Slice, node Node) []Frontend {
	return s.frontends(s.own(all), placeOf(node))
}

// own returns the Service's slices, sorted by name.
func (s *Service) own(all []*Slice) []*Slice {
	own := slices.DeleteFunc(slices.Clone(all), func(es *Slice) bool { return es.Of != s.Name })
	slices.SortFunc(own, func(a, b *Slice) int { return strings.Compare(a.Name.Name, b.Name.Name) })
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
func (p place) holds(e *Endpoint) bool { return p.name != "" && e.Node == p.node }

// frontends is Frontends, of what is kept.
func (s *Service) frontends(own []*Slice, at place) []Frontend {
	if len(s.Addrs) == 0 || len(s.Ports) == 0 {
		return nil
	}
	all := make([]Frontend, 0, len(s.Addrs)*len(s.Ports))
	for _, p := range s.Ports {
		var chosen inet.Each[choice]
		var known inet.Each[bool]
		for _, a := range s.Addrs {
			f := Frontend{Key: Key{a.Addr, p.Protocol, p.Number}, Service: s.Name, PortName: p.Name, Kind: a.Kind, Affinity: s.Affinity}
			if a.Kind == NodePort {
				f.Port = p.NodePort
			}
			if f.Port == 0 {
				continue
			}
			family := inet.FamilyOf(a.Addr)
			c := chosen.Of(family)
			if known := known.Of(family); !*known {
				*c = choose(candidates(own, p, family), at, s.LocalInside || s.LocalOutside)
				*known = true
			}
			f.Inside, f.Outside = s.backends(a.Kind, c)
			if a.Kind == LoadBalancer {
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
func (s *Service) backends(k Kind, c *choice) (in, out Backends) {
	switch {
	case k == ClusterIP && s.LocalInside:
		return c.local, c.local
	case k != ClusterIP && s.LocalOutside:
		return c.cluster, c.local
	}
	return c.cluster, c.cluster
}

// sourcesAt are who may come to the Service's load balancer's addresses on a node. Where such an address is an interface's
// of the node, as some load balancers do it, what the node sends there comes from that very address: it may come if the
// node itself may, as kube-proxy has it.
func (s *Service) sourcesAt(at place, family inet.Family) []netip.Prefix {
	ranges := *s.Sources.Of(family)
	contain := func(a netip.Addr) bool {
		return inet.Contains(ranges, a)
	}
	if !slices.ContainsFunc(at.addrs, contain) {
		return ranges
	}
	all := slices.Clone(ranges)
	for _, a := range s.Addrs {
		if a.Kind == LoadBalancer && inet.FamilyOf(a.Addr) == family && !contain(a.Addr) {
			all = append(all, netip.PrefixFrom(a.Addr, a.Addr.BitLen()))
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// healthCheck says whether the Service has one, and what the node answers. Endpoints that terminate do not count,
// though they serve while there are no others: a load balancer is to go elsewhere.
func (s *Service) healthCheck(own []*Slice, at place) (HealthCheck, bool) {
	if s.HealthPort == 0 {
		return HealthCheck{}, false
	}
	var ready inet.Each[[]netip.Addr]
	for _, es := range own {
		if len(es.Ports) == 0 || !*s.Serves.Of(es.Family) {
			continue
		}
		for i := range es.Endpoints {
			if e := &es.Endpoints[i]; e.Ready && at.holds(e) && !slices.Contains(*ready.Of(es.Family), e.Addr) {
				*ready.Of(es.Family) = append(*ready.Of(es.Family), e.Addr)
			}
		}
	}
	// A pod of both families is one endpoint.
	return HealthCheck{s.Name, s.HealthPort, max(len(ready.V4), len(ready.V6))}, true
}
