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

// Frontends returns the frontends of a Service on a node, sorted by keys. It ignores slices of other Services. It does not know
// what other Services claim; Model does.
func Frontends(s *Service, all []*Slice, node Node) []Frontend {
	return s.frontends(s.own(all), placeOf(node))
}

// own returns the Service's slices, sorted by name.
func (s *Service) own(all []*Slice) []*Slice {
	own := slices.DeleteFunc(slices.Clone(all), func(es *Slice) bool { return es.Of != s.Name })
	slices.SortFunc(own, func(a, b *Slice) int { return strings.Compare(a.Name.Name, b.Name.Name) })
	return own
}

// place is a node in a form that compares quickly with endpoints.
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

// holds says whether an endpoint is on the node. An endpoint that names no node is on none. On an unknown node there are none.
func (p place) holds(e *Endpoint) bool { return p.name != "" && e.Node == p.node }

// frontends is Frontends for the sorted slices of the Service.
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
	// A Service may name an address twice, as an external IP and as its load balancer's. The sort is stable, so the first kind of
	// s.Addrs stays, which is the stricter one.
	slices.SortStableFunc(all, func(a, b Frontend) int { return a.Compare(b.Key) })
	return slices.CompactFunc(all, func(a, b Frontend) bool { return a.Key == b.Key })
}

// backends returns the backends of a frontend of a kind for clients inside and outside. A pod that dials an external address of a
// Service may reach any endpoint, as if there were no load balancer: the policy Local exists to preserve the client's address,
// and a pod's address is preserved anyway.
func (s *Service) backends(k Kind, c *choice) (in, out Backends) {
	switch {
	case k == ClusterIP && s.LocalInside:
		return c.local, c.local
	case k != ClusterIP && s.LocalOutside:
		return c.cluster, c.local
	}
	return c.cluster, c.cluster
}

// sourcesAt returns the permitted sources for the Service's load balancer addresses on a node. Some load balancers assign such an
// address to an interface of the node. What the node sends there then has this address as its source, so it is permitted if
// the node itself is. kube-proxy does the same.
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

// healthCheck says whether the Service has a health check, and what the node answers. Terminating endpoints do not count, although
// they serve if there are no others: the load balancer has to choose another node.
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
