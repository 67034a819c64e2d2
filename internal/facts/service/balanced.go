package service

import (
	"maps"
	"net/netip"
	"slices"
	"unique"
)

// LoadBalanced is a Service with addresses that nodes announce to the network outside of the cluster, and the nodes that may
// announce them. All lists are sorted.
type LoadBalanced struct {
	Service Name
	Labels  map[string]string
	Addrs   []netip.Addr // the load balancer's
	// ExternalIPs are those that are served and that an AddressPool contains for the Service. The cluster must not announce
	// others.
	ExternalIPs []netip.Addr
	// Local is externalTrafficPolicy: Local.
	Local bool
	// Nodes are, if Local, the nodes with a ready endpoint or, if there is none in the cluster, with one that still serves.
	Nodes []string
	// ClusterIPs are present after SetClusterIPs(true). LocalInside and NodesInside are Local and Nodes for them, by
	// internalTrafficPolicy.
	ClusterIPs  []netip.Addr
	LocalInside bool
	NodesInside []string
}

func (l LoadBalanced) equal(o LoadBalanced) bool {
	return l.Service == o.Service && maps.Equal(l.Labels, o.Labels) && slices.Equal(l.Addrs, o.Addrs) && slices.Equal(l.ExternalIPs, o.ExternalIPs) &&
		l.Local == o.Local && slices.Equal(l.Nodes, o.Nodes) &&
		slices.Equal(l.ClusterIPs, o.ClusterIPs) && l.LocalInside == o.LocalInside && slices.Equal(l.NodesInside, o.NodesInside)
}

// LoadBalancers returns the Services with addresses to announce, sorted by Service. differs is false, and the list nil, if nothing
// has changed since the last call.
func (m *Model) LoadBalancers() (list []LoadBalanced, differs bool) {
	m.update()
	if !m.differs {
		return nil, false
	}
	m.differs = false
	return slices.SortedFunc(maps.Values(m.balanced), func(a, b LoadBalanced) int { return a.Service.Compare(b.Service) }), true
}

// SetClusterIPs says whether LoadBalancers returns ClusterIPs, which all Services have and few clusters announce.
func (m *Model) SetClusterIPs(on bool) {
	if m.tellsClusterIPs == on {
		return
	}
	m.tellsClusterIPs = on
	for _, e := range m.services {
		m.touch(e)
	}
}

// balance updates m.balanced for a Service. It reads e.refused, which must be up to date.
func (m *Model) balance(e *entry) {
	before, was := m.balanced[e]
	now, is := LoadBalanced{}, false
	if e.service != nil {
		now, is = m.loadBalanced(e)
	}
	switch {
	case is && (!was || !now.equal(before)):
		m.balanced[e], m.differs = now, true
	case was && !is:
		delete(m.balanced, e)
		m.differs = true
	}
}

// loadBalanced returns what LoadBalancers reports for a Service, if the Service has addresses to announce.
func (m *Model) loadBalanced(e *entry) (LoadBalanced, bool) {
	s := e.service
	l := LoadBalanced{Service: s.Name}
	for _, a := range s.Addrs {
		switch {
		case a.Kind == LoadBalancer:
			l.Addrs = append(l.Addrs, a.Addr)
		case a.Kind == ExternalIP && e.refused[a.Addr] == nil && m.unpooled(e, a.Addr) == nil:
			l.ExternalIPs = append(l.ExternalIPs, a.Addr)
		case a.Kind == ClusterIP && m.tellsClusterIPs:
			l.ClusterIPs = append(l.ClusterIPs, a.Addr)
		}
	}
	outer, inner := len(l.Addrs)+len(l.ExternalIPs) > 0, len(l.ClusterIPs) > 0
	if !outer && !inner {
		return l, false
	}
	l.Labels = s.Labels
	for _, list := range [][]netip.Addr{l.Addrs, l.ExternalIPs, l.ClusterIPs} {
		slices.SortFunc(list, netip.Addr.Compare)
	}
	if l.Local = outer && s.LocalOutside; l.Local {
		l.Nodes = servingNodes(e.slices)
	}
	if l.LocalInside = inner && s.LocalInside; l.LocalInside {
		l.NodesInside = servingNodes(e.slices)
	}
	return l, true
}

// servingNodes returns the nodes with a ready endpoint or, if there is none in the cluster, those with one that still serves.
func servingNodes(own []*Slice) []string {
	if nodes := nodesOf(own, func(e *Endpoint) bool { return e.Ready }); len(nodes) > 0 {
		return nodes
	}
	return nodesOf(own, func(e *Endpoint) bool { return e.Serving })
}

func nodesOf(own []*Slice, counts func(*Endpoint) bool) []string {
	var nodes []string
	for _, es := range own {
		for i := range es.Endpoints {
			if e := &es.Endpoints[i]; e.Node != (unique.Handle[string]{}) && counts(e) && !slices.Contains(nodes, e.Node.Value()) {
				nodes = append(nodes, e.Node.Value())
			}
		}
	}
	slices.Sort(nodes)
	return nodes
}
