package service

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
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// LabelProxyName labels a Service that another proxy than the cluster's carries.
	LabelProxyName = "service.kubernetes.io/service-proxy-name"
	// What the API fills in where sessionAffinity: ClientIP says no time.
	usualAffinity = 3 * time.Hour
)

// An address family, as an index.
const (
	v4 = iota
	v6
)

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return v4
	}
	return v6
}

var familyName = [2]string{"IPv4", "IPv6"}

// A traffic policy's side, as an index.
const (
	inside = iota
	outside
)

// service is what is kept of a Service.
type service struct {
	name    types.NamespacedName
	created int64 // in seconds, as the API has it
	ports   []port
	labels  labels.Set
	addrs   []address
	// Whose addresses nobody else may have as an external IP, also where another proxy carries the Service.
	clusterIPs, balancerIPs []netip.Addr
	serves                  [2]bool // by family
	local                   [2]bool // whether a policy is Local, inside and outside
	affinity                time.Duration
	sources                 [2][]netip.Prefix // by family; nil is everyone
	healthPort              uint16
	problems                []string
}

type port struct {
	name     string
	id       unique.Handle[string] // of the name, to compare it with a slice's
	protocol Protocol
	number   uint16
	nodePort uint16 // 0 is none
}

// address is one of a Service's addresses. A NodePort's is 0.0.0.0 or ::.
type address struct {
	addr netip.Addr
	kind Kind
}

// slice is what is kept of an EndpointSlice.
type slice struct {
	name      string
	family    int
	ports     []slicePort
	endpoints []endpoint
}

type slicePort struct {
	name     unique.Handle[string]
	protocol Protocol
	number   uint16
}

// endpoint is one of 100,000 in a large cluster, so what many share is there once.
type endpoint struct {
	addr  netip.Addr
	node  unique.Handle[string] // the zero handle if it names none
	hints unique.Handle[hints]  // the zero handle if it has none
	condition
}

type condition struct{ ready, serving, terminating bool }

// hints are the zones and nodes whose clients an endpoint is meant for, with commas between.
type hints struct{ zones, nodes string }

// readService takes out of a Service what is kept. What is wrong is left out, and told.
func readService(svc *corev1.Service) *service {
	s := &service{
		name:    types.NamespacedName{Namespace: svc.Namespace, Name: svc.Name},
		created: svc.CreationTimestamp.Unix(),
		labels:  svc.Labels,
	}
	s.readOwned(svc)
	if !balanced(svc) {
		return s
	}
	s.readAddrs(svc)
	s.readPorts(svc)
	s.readSources(svc)
	s.local[inside] = svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal
	s.local[outside] = svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		s.affinity = usualAffinity
		if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil && *c.ClientIP.TimeoutSeconds > 0 {
			s.affinity = time.Duration(*c.ClientIP.TimeoutSeconds) * time.Second
		}
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer && s.local[outside] {
		if s.healthPort = portNumber(svc.Spec.HealthCheckNodePort); s.healthPort == 0 {
			s.problem("externalTrafficPolicy is Local, and there is no healthCheckNodePort at which a load balancer could ask which nodes have endpoints: set one")
		}
	}
	return s
}

// readOwned takes the addresses that a Service was given. Those of a load balancer that is a proxy are among them.
func (s *service) readOwned(svc *corev1.Service) {
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		return
	}
	add := func(to *[]netip.Addr, ip string) {
		if a, err := ParseAddr(ip); err == nil && !slices.Contains(*to, a) { // "None" is no address
			*to = append(*to, a)
		}
	}
	for _, ip := range append([]string{svc.Spec.ClusterIP}, svc.Spec.ClusterIPs...) {
		add(&s.clusterIPs, ip)
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, in := range svc.Status.LoadBalancer.Ingress {
			add(&s.balancerIPs, in.IP)
		}
	}
}

// balanced says whether a Service is for us to balance.
func balanced(svc *corev1.Service) bool {
	_, others := svc.Labels[LabelProxyName]
	_, headless := svc.Labels[corev1.IsHeadlessService]
	return !others && !headless && svc.Spec.Type != corev1.ServiceTypeExternalName &&
		svc.Spec.ClusterIP != "" && svc.Spec.ClusterIP != corev1.ClusterIPNone
}

func (s *service) problem(format string, args ...any) {
	s.problems = append(s.problems, fmt.Sprintf(format, args...))
}

// readAddrs takes a Service's addresses. Where one is named twice, the first kind of these counts: its own, its load
// balancer's, whose sources may be limited, what somebody wrote down.
func (s *service) readAddrs(svc *corev1.Service) {
	own := svc.Spec.ClusterIPs
	if len(own) == 0 {
		own = []string{svc.Spec.ClusterIP}
	}
	for _, ip := range own {
		a, err := ParseAddr(ip)
		if err == nil {
			err = special(a)
		}
		if err != nil {
			s.problem("clusterIPs: %q %v: make the Service anew", ip, err)
			continue
		}
		if list := svc.Spec.IPFamilies; len(list) == 0 || slices.Contains(list, corev1.IPFamily(familyName[familyOf(a)])) {
			s.serves[familyOf(a)] = true
			s.add(a, ClusterIP)
		}
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer {
		for _, in := range svc.Status.LoadBalancer.Ingress {
			// A load balancer that is a proxy must see what comes from inside, too: its address is not ours to answer.
			if in.IP != "" && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP) {
				s.addExternal("status.loadBalancer", in.IP, LoadBalancer, special)
			}
		}
	}
	for _, ip := range svc.Spec.ExternalIPs {
		s.addExternal("externalIPs", ip, ExternalIP, notForOthers)
	}
	if svc.Spec.Type == corev1.ServiceTypeLoadBalancer || svc.Spec.Type == corev1.ServiceTypeNodePort {
		for family, any := range [2]netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if s.serves[family] {
				s.add(any, NodePort)
			}
		}
	}
}

func (s *service) addExternal(field, ip string, k Kind, wrong func(netip.Addr) error) {
	a, err := ParseAddr(ip)
	if err == nil {
		err = wrong(a)
	}
	switch {
	case err != nil:
		s.problem("%s: %q %v: name another address", field, ip, err)
	case !s.serves[familyOf(a)]:
		s.problem("%s: %s is of a family that the Service does not have: add %s to ipFamilies, or take the address away", field, a, familyName[familyOf(a)])
	default:
		s.add(a, k)
	}
}

func (s *service) add(a netip.Addr, k Kind) {
	if !slices.ContainsFunc(s.addrs, func(o address) bool { return o.addr == a }) {
		s.addrs = append(s.addrs, address{a, k})
	}
}

func (s *service) readPorts(svc *corev1.Service) {
	s.ports = make([]port, 0, len(svc.Spec.Ports))
	for _, p := range svc.Spec.Ports {
		protocol, ok := protocolOf(&p.Protocol)
		number := portNumber(p.Port)
		if !ok || number == 0 {
			s.problem("port %d/%s is left out: want 1 to 65535 of TCP, UDP or SCTP", p.Port, p.Protocol)
			continue
		}
		s.ports = append(s.ports, port{p.Name, unique.Make(p.Name), protocol, number, portNumber(p.NodePort)})
	}
}

// readSources takes who may come to a load balancer's address. Once somebody limits it, a family that is not named has
// nobody: who closes a door for IPv4 does not mean to leave it open for IPv6.
func (s *service) readSources(svc *corev1.Service) {
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
	var everyone [2]bool
	s.sources = [2][]netip.Prefix{{}, {}}
	for _, word := range list {
		p, err := parsePrefix(strings.TrimSpace(word))
		if err != nil {
			s.problem("%s: %q is no range of addresses and lets nobody in: write it as in 203.0.113.0/24", field, word)
			continue
		}
		family := familyOf(p.Addr())
		s.sources[family] = append(s.sources[family], p)
		everyone[family] = everyone[family] || p.Bits() == 0
	}
	for family := range s.sources {
		slices.SortFunc(s.sources[family], netip.Prefix.Compare)
		s.sources[family] = slices.Compact(s.sources[family])
		if everyone[family] {
			s.sources[family] = nil
		}
		met := slices.ContainsFunc(s.addrs, func(a address) bool { return a.kind == LoadBalancer && familyOf(a.addr) == family })
		if s.sources[family] != nil && len(s.sources[family]) == 0 && met {
			s.problem("%s names no %s range, so nobody may come to the load balancer's %[2]s address: add who may", field, familyName[family])
		}
	}
}

// serviceOf returns the Service that an EndpointSlice is for, if there are frontends that could use it.
func serviceOf(es *discoveryv1.EndpointSlice) (types.NamespacedName, bool) {
	name := es.Labels[discoveryv1.LabelServiceName]
	_, headless := es.Labels[corev1.IsHeadlessService]
	known := es.AddressType == discoveryv1.AddressTypeIPv4 || es.AddressType == discoveryv1.AddressTypeIPv6
	return types.NamespacedName{Namespace: es.Namespace, Name: name}, name != "" && !headless && known
}

// readSlice takes out of an EndpointSlice what is kept. Endpoints and ports that nothing can be sent to are left out.
func readSlice(es *discoveryv1.EndpointSlice) *slice {
	s := &slice{name: es.Name}
	if es.AddressType == discoveryv1.AddressTypeIPv6 {
		s.family = v6
	}
	s.ports = make([]slicePort, 0, len(es.Ports))
	for i := range es.Ports {
		if p, err := readSlicePort(&es.Ports[i]); err == nil {
			s.ports = append(s.ports, p)
		}
	}
	s.endpoints = make([]endpoint, 0, len(es.Endpoints))
	for i := range es.Endpoints {
		e := &es.Endpoints[i]
		addr, err := endpointAddr(e, s.family)
		if err != nil {
			continue
		}
		kept := endpoint{addr: addr, hints: hintsOf(e.Hints), condition: conditionOf(e.Conditions)}
		if e.NodeName != nil && *e.NodeName != "" {
			kept.node = unique.Make(*e.NodeName)
		}
		s.endpoints = append(s.endpoints, kept)
	}
	return s
}

func readSlicePort(p *discoveryv1.EndpointPort) (slicePort, error) {
	var name string
	if p.Name != nil {
		name = *p.Name
	}
	if p.Port == nil {
		return slicePort{}, errors.New("has no number")
	}
	number := portNumber(*p.Port)
	protocol, ok := protocolOf(p.Protocol)
	if number == 0 || !ok {
		return slicePort{}, errors.New("is none of TCP, UDP or SCTP")
	}
	return slicePort{unique.Make(name), protocol, number}, nil
}

// endpointAddr returns the address of an endpoint. It has one; of more, which the API allows and nothing writes, the
// first is as good as any.
func endpointAddr(e *discoveryv1.Endpoint, family int) (netip.Addr, error) {
	if len(e.Addresses) == 0 {
		return netip.Addr{}, errors.New("has no address")
	}
	a, err := ParseAddr(e.Addresses[0])
	switch {
	case err != nil:
		return a, err
	case familyOf(a) != family:
		return a, fmt.Errorf("is not of the slice's family, %s", familyName[family])
	}
	return a, notForOthers(a)
}

// conditionOf fills in what an endpoint does not say: it is ready, serves and does not terminate.
func conditionOf(c discoveryv1.EndpointConditions) condition {
	return condition{
		ready:       c.Ready == nil || *c.Ready,
		serving:     c.Serving == nil || *c.Serving,
		terminating: c.Terminating != nil && *c.Terminating,
	}
}

func hintsOf(h *discoveryv1.EndpointHints) unique.Handle[hints] {
	if h == nil || len(h.ForZones) == 0 && len(h.ForNodes) == 0 {
		return unique.Handle[hints]{}
	}
	zones, nodes := make([]string, len(h.ForZones)), make([]string, len(h.ForNodes))
	for i, z := range h.ForZones {
		zones[i] = z.Name
	}
	for i, n := range h.ForNodes {
		nodes[i] = n.Name
	}
	return unique.Make(hints{strings.Join(zones, ","), strings.Join(nodes, ",")})
}

func protocolOf(p *corev1.Protocol) (Protocol, bool) {
	if p == nil {
		return TCP, true
	}
	switch *p {
	case corev1.ProtocolTCP, "":
		return TCP, true
	case corev1.ProtocolUDP:
		return UDP, true
	case corev1.ProtocolSCTP:
		return SCTP, true
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

// ParseAddr reads an address as the API has always done: zeros before a number mean nothing, and IPv4 may be written
// within IPv6. New objects are refused such addresses, old ones keep them.
func ParseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil {
		parts := strings.Split(s, ".")
		for i, p := range parts {
			n, err := strconv.ParseUint(p, 10, 8)
			if err != nil {
				return a, errors.New("is no address")
			}
			parts[i] = strconv.Itoa(int(n))
		}
		if a, err = netip.ParseAddr(strings.Join(parts, ".")); err != nil {
			return a, errors.New("is no address")
		}
	}
	if a.Zone() != "" {
		return a, errors.New("is of one link alone")
	}
	return a.Unmap(), nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	addr, bits, _ := strings.Cut(s, "/")
	a, err := ParseAddr(addr)
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
