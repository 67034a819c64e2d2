package service

import (
	"maps"
	"net/netip"
	"slices"
	"unique"

	"k8s.io/apimachinery/pkg/types"
)

// LoadBalanced is a Service with addresses of a load balancer, and where in the cluster it can be reached by them.
type LoadBalanced struct {
	Service types.NamespacedName
	Addrs   []netip.Addr // sorted
	// Local is externalTrafficPolicy: Local.
	Local bool
	// Nodes, of a Local one, are those with an endpoint that is ready, or, if there is none at all, with one that still
	// serves; sorted.
	Nodes []string
}

func (l LoadBalanced) equal(o LoadBalanced) bool {
	return l.Service == o.Service && l.Local == o.Local && slices.Equal(l.Addrs, o.Addrs) && slices.Equal(l.Nodes, o.Nodes)
}

// LoadBalancers returns the Services with addresses of a load balancer, sorted by Service, if that is something else than
// at the last call.
func (m *Model) LoadBalancers() (list []LoadBalanced, differs bool) {
	m.update()
	if !m.differs {
		return nil, false
	}
	m.differs = false
	return slices.SortedFunc(maps.Values(m.balanced), func(a, b LoadBalanced) int { return compareNames(a.Service, b.Service) }), true
}

// balance brings what is kept of a Service's load balancer up to date.
func (m *Model) balance(e *entry) {
	before, was := m.balanced[e]
	now, is := LoadBalanced{}, false
	if e.service != nil {
		now, is = e.service.loadBalanced(e.slices)
	}
	switch {
	case is && (!was || !now.equal(before)):
		m.balanced[e], m.differs = now, true
	case was && !is:
		delete(m.balanced, e)
		m.differs = true
	}
}

// loadBalanced says what a Service is to who comes to its load balancer's addresses, if it has any.
func (s *service) loadBalanced(own []*slice) (LoadBalanced, bool) {
	l := LoadBalanced{Service: s.name, Local: s.local[outside]}
	for _, a := range s.addrs {
		if a.kind == LoadBalancer {
			l.Addrs = append(l.Addrs, a.addr)
		}
	}
	if len(l.Addrs) == 0 {
		return l, false
	}
	slices.SortFunc(l.Addrs, netip.Addr.Compare)
	if l.Local {
		if l.Nodes = nodesOf(own, func(e *endpoint) bool { return e.ready }); len(l.Nodes) == 0 {
			l.Nodes = nodesOf(own, func(e *endpoint) bool { return e.serving })
		}
	}
	return l, true
}

func nodesOf(own []*slice, counts func(*endpoint) bool) []string {
	var nodes []string
	for _, es := range own {
		for i := range es.endpoints {
			if e := &es.endpoints[i]; e.node != (unique.Handle[string]{}) && counts(e) && !slices.Contains(nodes, e.node.Value()) {
				nodes = append(nodes, e.node.Value())
			}
		}
	}
	slices.Sort(nodes)
	return nodes
}
