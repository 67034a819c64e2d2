package service

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// ExternalIPs decides which addresses of spec.externalIPs are served. Every user who may write a Service can choose any address
// there, and every node then sends traffic to that address to the Service's endpoints: CVE-2020-8554. The zero value serves
// none.
type ExternalIPs struct {
	Mode netconf.ExternalIPs
	// PodsOnly serves external IPs for pods and for other machines only. Processes in the node's own network namespace, and so
	// host-network pods, reach the machine that has the address outside of the cluster.
	PodsOnly bool
	// Reserved are never served, whatever the mode. Model adds the addresses of Services, and those of the API servers from their
	// EndpointSlices.
	Reserved []Reserved
	// Pools are what the mode netconf.ExternalIPsPools allows. Whatever the mode, only their addresses are announced.
	Pools []ExternalIPPool
}

// Reserved is a range of addresses that no Service may take as an external IP.
type Reserved struct {
	netip.Prefix
	Owner ReservedOwner
	Name  string // of the owner, where it has one: a node, an IPPool, a ServiceCIDR
}

// ReservedOwner is the owner of a reserved range, as messages name it.
type ReservedOwner string

// The owners.
const (
	ReservedNode        ReservedOwner = "the own address of node"
	ReservedPodCIDR     ReservedOwner = "an address of the pods of node"
	ReservedIPPool      ReservedOwner = "an address of pods, of IPPool"
	ReservedServiceCIDR ReservedOwner = "an address of ServiceCIDR"
	ReservedAPIServer   ReservedOwner = "the API server's address"
	ReservedNodeCache   ReservedOwner = "the address of the DNS cache on nodes"
)

func (r Reserved) String() string {
	if r.Name == "" {
		return string(r.Owner)
	}
	return string(r.Owner) + " " + r.Name
}

// ExternalIPPool is an AddressPool, as far as it allows external IPs.
type ExternalIPPool struct {
	Name       string
	Contains   func(netip.Addr) bool
	Ranges     string                              // the source of Contains, for comparison
	Namespaces map[string]bool                     // those whose Services may have its addresses; nil means all
	Selects    func(labels map[string]string) bool // whether a Service with these labels may
	Selector   string                              // the source of Selects, for comparison
}

// Equal reports whether two policies decide alike.
func (x ExternalIPs) Equal(o ExternalIPs) bool {
	return x.Mode == o.Mode && x.PodsOnly == o.PodsOnly && slices.Equal(x.Reserved, o.Reserved) &&
		slices.EqualFunc(x.Pools, o.Pools, func(a, b ExternalIPPool) bool {
			return a.Name == b.Name && a.Ranges == b.Ranges && (a.Namespaces == nil) == (b.Namespaces == nil) &&
				maps.Equal(a.Namespaces, b.Namespaces) && a.Selector == b.Selector
		})
}

// reservations finds the reserved range that an address is in.
type reservations struct {
	byPrefix map[netip.Prefix]Reserved
	bits     map[int]bool // the prefix lengths in use: few, even with many nodes
}

func newReservations(list []Reserved) reservations {
	r := reservations{byPrefix: make(map[netip.Prefix]Reserved, len(list)), bits: map[int]bool{}}
	for _, x := range list {
		p := x.Masked()
		if _, found := r.byPrefix[p]; !found {
			r.byPrefix[p] = x
		}
		r.bits[p.Bits()] = true
	}
	return r
}

func (r reservations) find(a netip.Addr) (found Reserved, ok bool) {
	for bits := range r.bits {
		p, err := a.Prefix(bits)
		if err != nil {
			continue // of the other family
		}
		// A node's own address says more than the range around it.
		if x, there := r.byPrefix[p]; there && (!ok || x.Bits() > found.Bits()) {
			found, ok = x, true
		}
	}
	return found, ok
}

// external returns the external IPs of a Service that are not served, with the reason.
func (m *Model) external(e *entry) map[netip.Addr]error {
	var refused map[netip.Addr]error
	for _, a := range e.service.Addrs {
		if a.Kind != ExternalIP {
			continue
		}
		if err := m.refuse(e, a.Addr); err != nil {
			if refused == nil {
				refused = map[netip.Addr]error{}
			}
			refused[a.Addr] = err
		}
	}
	return refused
}

// refuse returns why an address is not served as an external IP of a Service, or nil if it is.
func (m *Model) refuse(e *entry, a netip.Addr) error {
	switch m.externalIPs.Mode {
	case netconf.ExternalIPsAny, netconf.ExternalIPsPools:
	case netconf.ExternalIPsOff:
		return errors.New("the setting externalIPs is off")
	default:
		return errors.New("the cluster's configuration is not known yet")
	}
	if r, found := m.reserved.find(a); found {
		return fmt.Errorf("it is %s", r)
	}
	others := slices.DeleteFunc(slices.Clone(m.holders[a]), func(o *entry) bool { return o == e })
	if len(others) > 0 {
		o := slices.MinFunc(others, func(x, y *entry) int { return x.name.Compare(y.name) })
		what := "load-balancer address"
		if slices.Contains(o.service.ClusterIPs, a) {
			what = "ClusterIP"
		}
		return fmt.Errorf("it is the %s of Service %s", what, o.name)
	}
	if api := m.services[apiServer]; api != nil && api.has(a) {
		return fmt.Errorf("it is %s", ReservedAPIServer)
	}
	if m.externalIPs.Mode == netconf.ExternalIPsAny {
		return nil
	}
	return m.unpooled(e, a)
}

// unpooled returns why no AddressPool has an address for a Service, or nil if one has.
func (m *Model) unpooled(e *entry, a netip.Addr) error {
	why := errors.New("no AddressPool has it, and the setting externalIPs is pools")
	for _, p := range m.externalIPs.Pools {
		switch {
		case !p.Contains(a):
		case p.Namespaces != nil && !p.Namespaces[e.name.Namespace]:
			why = fmt.Errorf("AddressPool %s, which has it, is not for namespace %s (spec.namespaceSelector)", p.Name, e.name.Namespace)
		case !p.Selects(e.service.Labels):
			why = fmt.Errorf("AddressPool %s, which has it, is not for Services with these labels (spec.serviceSelector)", p.Name)
		default:
			return nil
		}
	}
	return why
}

// apiServer is the Service whose endpoints are the API servers.
var apiServer = Name{"default", "kubernetes"}

// has says whether an endpoint has the address.
func (e *entry) has(a netip.Addr) bool {
	return slices.ContainsFunc(e.slices, func(s *Slice) bool {
		return slices.ContainsFunc(s.Endpoints, func(x Endpoint) bool { return x.Addr == a })
	})
}

// SetExternalIPs sets which external IPs are served. Before the first call a Model serves none.
func (m *Model) SetExternalIPs(x ExternalIPs) {
	if m.externalIPs.Equal(x) {
		return
	}
	m.externalIPs, m.reserved = x, newReservations(x.Reserved)
	m.touchAskers()
}

// touchAskers marks all Services with external IPs for recomputation.
func (m *Model) touchAskers() {
	for _, list := range m.askers {
		for _, e := range list {
			m.touch(e)
		}
	}
}

// index replaces a Service's addresses in the maps holders and askers. If the Service gains or loses an address that is an
// external IP of others, index marks those for recomputation.
func (m *Model) index(e *entry, before, now *Service) {
	change := func(in map[netip.Addr][]*entry, was, is []netip.Addr, each func(netip.Addr)) {
		for _, a := range was {
			if !slices.Contains(is, a) {
				if in[a] = slices.DeleteFunc(in[a], func(o *entry) bool { return o == e }); len(in[a]) == 0 {
					delete(in, a)
				}
				each(a)
			}
		}
		for _, a := range is {
			if !slices.Contains(was, a) {
				in[a] = append(in[a], e)
				each(a)
			}
		}
	}
	change(m.askers, before.asked(), now.asked(), func(netip.Addr) {})
	change(m.holders, before.held(), now.held(), func(a netip.Addr) {
		for _, o := range m.askers[a] {
			m.touch(o)
		}
	})
}

// asked returns the external IPs that a Service asks for, without duplicates.
func (s *Service) asked() []netip.Addr {
	if s == nil {
		return nil
	}
	var all []netip.Addr
	for _, a := range s.Addrs {
		if a.Kind == ExternalIP {
			all = append(all, a.Addr)
		}
	}
	return all
}

// held returns the addresses that the API server or a load balancer's controller has assigned to a Service, without duplicates.
func (s *Service) held() []netip.Addr {
	if s == nil {
		return nil
	}
	all := slices.Clone(s.ClusterIPs)
	for _, a := range s.BalancerIPs {
		if !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	return all
}
