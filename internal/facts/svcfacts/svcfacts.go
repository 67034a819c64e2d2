// Package svcfacts reads what Services mean out of the API's objects: Services, EndpointSlices and Nodes.
package svcfacts

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// What the API fills in where sessionAffinity: ClientIP says no time.
const usualAffinity = 3 * time.Hour

// Service reads a Service. What is wrong is left out, and told.
func Service(svc *corev1.Service) *service.Service {
	r := &reader{service.Service{
		Name:    service.Name{Namespace: svc.Namespace, Name: svc.Name},
		Created: svc.CreationTimestamp.Unix(),
		Labels:  svc.Labels,
	}}
	r.read(svc)
	return &r.Service
}

// reader is a Service that is being read.
type reader struct{ service.Service }

func (s *reader) read(svc *corev1.Service) {
	s.readOwned(svc)
	if !balanced(svc) {
		return
	}
	s.readAddrs(svc)
	s.readPorts(svc)
	s.readSources(svc)
	s.LocalInside = svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	s.LocalOutside = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		s.Affinity = usualAffinity
		if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
			s.Affinity = time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
		}
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer && s.LocalOutside {
		if s.HealthPort = portNumber(svc.Spec.HealthCheckNodePort); s.HealthPort == 0 {
			s.problem("externalTrafficPolicy is Local, and there is no healthCheckNodePort at which a load balancer could ask which nodes have endpoints: set one")
		}
	}
}

// readOwned takes the addresses that a Service was given. Those of a load balancer that is a proxy are among them.
func (s *reader) readOwned(svc *corev1.Service) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	add := func(to *[]netip.Addr, ip string) {
		if a, err := inet.ParseAddr(ip); err == nil && !slices.Contains(*to, a) { // "None" is no address
			*to = append(*to, a)
		}
	}
	for _, ip := range append([]string{svc.Spec.ClusterIP}, svc.Spec.ClusterIPs...) {
		add(&s.ClusterIPs, ip)
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, in := range svc.Status.LoadBalancer.Ingress {
			add(&s.BalancerIPs, in.IP)
		}
	}
}

// balanced says whether a Service is for us to balance.
func balanced(svc *corev1.Service) bool {
	_, others := svc.Labels[service.LabelProxyName]
	_, headless := svc.Labels[corev1.IsHeadlessService]
	return !others && !headless && svc.Spec.Type != corev1.ServiceTypeExternalName &&
		svc.Spec.ClusterIP != "" && svc.Spec.ClusterIP != corev1.ClusterIPNone
}

func (s *reader) problem(format string, args ...any) {
	s.Problems = append(s.Problems, fmt.Sprintf(format, args...))
}

// readAddrs takes a Service's addresses. Where one is named twice, the first kind of these counts: its own, its load
// balancer's, whose sources may be limited, what somebody wrote down.
func (s *reader) readAddrs(svc *corev1.Service) {
	own := svc.Spec.ClusterIPs
	if len(own) == 0 {
		own = []string{svc.Spec.ClusterIP}
	}
	for _, ip := range own {
		a, err := inet.ParseAddr(ip)
		if err == nil {
			err = special(a)
		}
		if err != nil {
			s.problem("clusterIPs: %q %v: make the Service anew", ip, err)
			continue
		}
		if list := svc.Spec.IPFamilies; len(list) == 0 || slices.Contains(list, corev1.IPFamily(inet.FamilyOf(a).String())) {
			*s.Serves.Of(inet.FamilyOf(a)) = true
			s.add(a, service.ClusterIP)
		}
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, in := range svc.Status.LoadBalancer.Ingress {
			// A load balancer that is a proxy must see what comes from inside, too: its address is not ours to answer.
			if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
				s.addExternal("status.loadBalancer", in.IP, service.LoadBalancer, special)
			}
		}
	}
	for _, ip := range svc.Spec.ExternalIPs {
		s.addExternal("externalIPs", ip, service.ExternalIP, notForOthers)
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer || svc.Spec.Type == corev1.ServiceTypeNodePort {
		for _, any := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if *s.Serves.Of(inet.FamilyOf(any)) {
				s.add(any, service.NodePort)
			}
		}
	}
}

func (s *reader) addExternal(field, ip string, k service.Kind, wrong func(netip.Addr) error) {
	a, err := inet.ParseAddr(ip)
	if err == nil {
		err = wrong(a)
	}
	switch {
	case err != nil:
		s.problem("%s: %q %v: name another address", field, ip, err)
	case !*s.Serves.Of(inet.FamilyOf(a)):
		s.problem("%s: %s is of a family that the Service does not have: add %s to ipFamilies, or take the address away", field, a, inet.FamilyOf(a))
	default:
		s.add(a, k)
	}
}

func (s *reader) add(a netip.Addr, k service.Kind) {
	if !slices.ContainsFunc(s.Addrs, func(o service.Address) bool { return o.Addr == a }) {
		s.Addrs = append(s.Addrs, service.Address{Addr: a, Kind: k})
	}
}

func (s *reader) readPorts(svc *corev1.Service) {
	s.Ports = make([]service.Port, 0, len(svc.Spec.Ports))
	for _, p := range svc.Spec.Ports {
		protocol, ok := protocolOf(&p.Protocol)
		number := portNumber(p.Port)
		if !ok || number == 0 {
			s.problem("port %d/%s is left out: want 1 to 65535 of TCP, UDP or SCTP", p.Port, p.Protocol)
			continue
		}
		s.Ports = append(s.Ports, service.Port{Name: p.Name, ID: unique.Make(p.Name), Protocol: protocol, Number: number, NodePort: portNumber(p.NodePort)})
	}
}

// readSources takes who may come to a load balancer's address. Once somebody limits it, a family that is not named has
// nobody: who closes a door for IPv4 does not mean to leave it open for IPv6.
func (s *reader) readSources(svc *corev1.Service) {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return
	}
	field, list := "loadBalancerSourceRanges", svc.Spec.LoadBalancerSourceRanges
	if len(list) == 0 {
		field = corev1.AnnotationLoadBalancerSourceRangesKey
		old := strings.TrimSpace(svc.Annotations[field])
		if old == "" {
			return
		}
		list = strings.Split(old, ",")
	}
	s.Sources = inet.Each[[]netip.Prefix]{V4: []netip.Prefix{}, V6: []netip.Prefix{}}
	for _, word := range list {
		p, err := parsePrefix(strings.TrimSpace(word))
		if err != nil {
			s.problem("%s: %q is no range of addresses and lets nobody in: write it as in 203.0.113.0/24", field, word)
			continue
		}
		ranges := s.Sources.Of(inet.FamilyOf(p.Addr()))
		*ranges = append(*ranges, p)
	}
	for _, family := range inet.Families {
		ranges := s.Sources.Of(family)
		slices.SortFunc(*ranges, netip.Prefix.Compare)
		*ranges = slices.Compact(*ranges)
		met := slices.ContainsFunc(s.Addrs, func(a service.Address) bool { return a.Kind == service.LoadBalancer && inet.FamilyOf(a.Addr) == family })
		switch {
		case slices.ContainsFunc(*ranges, func(p netip.Prefix) bool { return p.Bits() == 0 }):
			*ranges = nil
		case len(*ranges) == 0 && met:
			s.problem("%s names no %s range, so nobody may come to the load balancer's %[2]s address: add who may", field, family)
		}
	}
}

// serviceOf returns the Service that an EndpointSlice is for; the zero Name if no frontend could use it.
func serviceOf(es *discoveryv1.EndpointSlice) service.Name {
	name := es.Labels[discoveryv1.LabelServiceName]
	_, headless := es.Labels[corev1.IsHeadlessService]
	known := es.AddressType == discoveryv1.AddressTypeIPv4 || es.AddressType == discoveryv1.AddressTypeIPv6
	if name == "" || headless || !known {
		return service.Name{}
	}
	return service.Name{Namespace: es.Namespace, Name: name}
}

func familyOf(es *discoveryv1.EndpointSlice) inet.Family {
	if es.AddressType == discoveryv1.AddressTypeIPv6 {
		return inet.IPv6
	}
	return inet.IPv4
}

// Slice reads an EndpointSlice. Endpoints and ports that nothing can be sent to are left out.
func Slice(es *discoveryv1.EndpointSlice) *service.Slice {
	s := &service.Slice{Name: service.Name{Namespace: es.Namespace, Name: es.Name}, Of: serviceOf(es), Family: familyOf(es)}
	if s.Of == (service.Name{}) {
		return s
	}
	s.Ports = make([]service.SlicePort, 0, len(es.Ports))
	for i := range es.Ports {
		if p, err := readSlicePort(&es.Ports[i]); err == nil {
			s.Ports = append(s.Ports, p)
		}
	}
	s.Endpoints = make([]service.Endpoint, 0, len(es.Endpoints))
	for i := range es.Endpoints {
		e := &es.Endpoints[i]
		addr, err := endpointAddr(e, s.Family)
		if err != nil {
			continue
		}
		kept := service.Endpoint{Addr: addr, Hints: hintsOf(e.Hints), Condition: conditionOf(e.Conditions)}
		if e.NodeName != nil && *e.NodeName != "" {
			kept.Node = unique.Make(*e.NodeName)
		}
		s.Endpoints = append(s.Endpoints, kept)
	}
	return s
}

// Slices reads EndpointSlices.
func Slices(all []*discoveryv1.EndpointSlice) []*service.Slice { return each(all, Slice) }

// Services reads Services.
func Services(all []*corev1.Service) []*service.Service { return each(all, Service) }

func each[T, U any](all []*T, read func(*T) *U) []*U {
	list := make([]*U, len(all))
	for i, x := range all {
		list[i] = read(x)
	}
	return list
}

func readSlicePort(p *discoveryv1.EndpointPort) (service.SlicePort, error) {
	var name string
	if p.Name != nil {
		name = *p.Name
	}
	if p.Port == nil {
		return service.SlicePort{}, errors.New("has no number")
	}
	number := portNumber(*p.Port)
	protocol, ok := protocolOf(p.Protocol)
	if number == 0 || !ok {
		return service.SlicePort{}, errors.New("is none of TCP, UDP or SCTP")
	}
	return service.SlicePort{Name: unique.Make(name), Protocol: protocol, Number: number}, nil
}

// endpointAddr returns the address of an endpoint. It has one; of more, which the API allows and nothing writes, the
// first is as good as any.
func endpointAddr(e *discoveryv1.Endpoint, family inet.Family) (netip.Addr, error) {
	if len(e.Addresses) == 0 {
		return netip.Addr{}, errors.New("has no address")
	}
	a, err := inet.ParseAddr(e.Addresses[0])
	switch {
	case err != nil:
		return a, err
	case inet.FamilyOf(a) != family:
		return a, fmt.Errorf("is not of the slice's family, %s", family)
	}
	return a, notForOthers(a)
}

// conditionOf fills in what an endpoint does not say: it is ready, serves and does not terminate.
func conditionOf(c discoveryv1.EndpointConditions) service.Condition {
	return service.Condition{
		Ready:       c.Ready == nil || *c.Ready,
		Serving:     c.Serving == nil || *c.Serving,
		Terminating: c.Terminating != nil && *c.Terminating,
	}
}

func hintsOf(h *discoveryv1.EndpointHints) unique.Handle[service.Hints] {
	if h == nil || len(h.ForZones) == 0 && len(h.ForNodes) == 0 {
		return unique.Handle[service.Hints]{}
	}
	zones, nodes := make([]string, len(h.ForZones)), make([]string, len(h.ForNodes))
	for i, z := range h.ForZones {
		zones[i] = z.Name
	}
	for i, n := range h.ForNodes {
		nodes[i] = n.Name
	}
	return unique.Make(service.Hints{Zones: strings.Join(zones, ","), Nodes: strings.Join(nodes, ",")})
}

func protocolOf(p *corev1.Protocol) (service.Protocol, bool) {
	if p == nil {
		return service.TCP, true
	}
	switch *p {
	case corev1.ProtocolTCP, "":
		return service.TCP, true
	case corev1.ProtocolUDP:
		return service.UDP, true
	case corev1.ProtocolSCTP:
		return service.SCTP, true
	}
	return 0, false
}

// portNumber returns 0 for what is no port.
func portNumber(n int32) uint16 {
	if n < 1 || n > 65535 {
		return 0
	}
	return uint16(n)
}

func parsePrefix(s string) (netip.Prefix, error) {
	addr, bits, _ := strings.Cut(s, "/")
	a, err := inet.ParseAddr(addr)
	if err != nil {
		return netip.Prefix{}, err
	}
	n, err := strconv.Atoi(bits)
	if err != nil {
		return netip.Prefix{}, err
	}
	return a.Prefix(n)
}

// special says why an address cannot be that of a Service or an endpoint.
func special(a netip.Addr) error {
	switch {
	case a.IsUnspecified():
		return errors.New("is the unspecified address")
	case a.IsLoopback():
		return errors.New("is a loopback address")
	case a.IsMulticast():
		return errors.New("is a multicast address")
	}
	return nil
}

// notForOthers is special for what people may write down: with a link-local address they would reach the node's own
// neighbours, such as a cloud's metadata.
func notForOthers(a netip.Addr) error {
	if a.IsLinkLocalUnicast() {
		return errors.New("is a link-local address")
	}
	return special(a)
}

// ForeignAddrs are the cluster's addresses of a Service that another proxy carries (service.LabelProxyName); nil of one that none
// does.
func ForeignAddrs(s *corev1.Service) []netip.Addr {
	if _, labelled := s.Labels[service.LabelProxyName]; !labelled {
		return nil
	}
	var all []netip.Addr
	for _, ip := range s.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(ip); err == nil { // "None" is no address
			all = append(all, addr)
		}
	}
	return all
}

// Node takes out of a Node of the API what matters to Services.
func Node(n *corev1.Node) service.Node {
	return service.Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone], Addrs: apinode.Addrs(n)}
}
