package service_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

// change modifies the Service of a case.
type change func(*corev1.Service)

// web is the Service of most cases: http at 10.96.0.1:80.
func web(changes ...change) *corev1.Service {
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", CreationTimestamp: metav1.Unix(1000, 0)},
		Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeClusterIP, Selector: map[string]string{"app": "web"}},
	}
	clusterIPs("10.96.0.1")(svc)
	ports("http:80")(svc)
	for _, c := range changes {
		c(svc)
	}
	return svc
}

func named(name string, second int64) change {
	return func(s *corev1.Service) { s.Name, s.CreationTimestamp = name, metav1.Unix(second, 0) }
}

func clusterIPs(list ...string) change {
	return func(s *corev1.Service) {
		s.Spec.ClusterIP, s.Spec.ClusterIPs, s.Spec.IPFamilies = list[0], list, nil
		for _, ip := range list {
			if strings.Contains(ip, ":") {
				s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPv6Protocol)
			} else if ip != corev1.ClusterIPNone {
				s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPv4Protocol)
			}
		}
	}
}

var dual = clusterIPs("10.96.0.1", "fd00:96::1")

// ports are written name:port[:nodePort][/PROTOCOL].
func ports(list ...string) change {
	return func(s *corev1.Service) {
		s.Spec.Ports = nil
		for _, w := range list {
			w, protocol, _ := strings.Cut(w, "/")
			words := append(strings.Split(w, ":"), "0")
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{
				Name: words[0], Port: number(words[1]), NodePort: number(words[2]), Protocol: corev1.Protocol(protocol),
			})
		}
	}
}

func number(s string) int32 {
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil {
		panic(err)
	}
	return int32(n)
}

func typed(t corev1.ServiceType) change { return func(s *corev1.Service) { s.Spec.Type = t } }

func nodePort(s *corev1.Service) {
	s.Spec.Type = corev1.ServiceTypeNodePort
	ports("http:80:30080")(s)
}

func loadBalancer(ips ...string) change {
	return func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		for _, ip := range ips {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
	}
}

func ipMode(m corev1.LoadBalancerIPMode) change {
	return func(s *corev1.Service) {
		for i := range s.Status.LoadBalancer.Ingress {
			s.Status.LoadBalancer.Ingress[i].IPMode = &m
		}
	}
}

func externalIPs(ips ...string) change { return func(s *corev1.Service) { s.Spec.ExternalIPs = ips } }

func label(key string) change {
	return func(s *corev1.Service) { s.Labels = map[string]string{key: ""} }
}

func sources(list ...string) change {
	return func(s *corev1.Service) { s.Spec.LoadBalancerSourceRanges = list }
}

func oldSources(list string) change {
	return func(s *corev1.Service) {
		s.Annotations = map[string]string{corev1.AnnotationLoadBalancerSourceRangesKey: list}
	}
}

func affinity(seconds int32) change {
	return func(s *corev1.Service) {
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		if seconds != 0 {
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
		}
	}
}

func internalLocal(s *corev1.Service) {
	s.Spec.InternalTrafficPolicy = new(corev1.ServiceInternalTrafficPolicyLocal)
}

func externalLocal(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	s.Spec.HealthCheckNodePort = 32000
}

// slice returns an EndpointSlice of web. Ports have the form of ports. An endpoint begins with its address, and other words are
//
//	on=NODE  in=ZONE  pod=NAME  zones=A,B and nodes=A,B (hints)
//	ready  unready  serving  unserving  terminating
//
// A field without a word is not set.
func slice(name string, ports string, endpoints ...string) *discoveryv1.EndpointSlice {
	es := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, w := range strings.Fields(ports) {
		w, protocol, _ := strings.Cut(w, "/")
		name, port, found := strings.Cut(w, ":")
		p := discoveryv1.EndpointPort{Name: &name}
		if found {
			p.Port = new(number(port))
		}
		if protocol != "" {
			p.Protocol = new(corev1.Protocol(protocol))
		}
		es.Ports = append(es.Ports, p)
	}
	for _, line := range endpoints {
		es.Endpoints = append(es.Endpoints, endpoint(line))
	}
	return es
}

func endpoint(line string) discoveryv1.Endpoint {
	words := strings.Fields(line)
	e := discoveryv1.Endpoint{Addresses: words[:1]}
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "on":
			e.NodeName = &value
		case "in":
			e.Zone = &value
		case "pod":
			e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: value}
		case "zones", "nodes":
			if e.Hints == nil {
				e.Hints = &discoveryv1.EndpointHints{}
			}
			for n := range strings.SplitSeq(value, ",") {
				if key == "zones" {
					e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: n})
				} else {
					e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
				}
			}
		case "ready", "unready":
			e.Conditions.Ready = new(key == "ready")
		case "serving", "unserving":
			e.Conditions.Serving = new(key == "serving")
		case "terminating":
			e.Conditions.Terminating = new(true)
		default:
			panic(fmt.Sprintf("endpoint %q: no word %q", line, w))
		}
	}
	return e
}

func slice6(name string, ports string, endpoints ...string) *discoveryv1.EndpointSlice {
	es := slice(name, ports, endpoints...)
	es.AddressType = discoveryv1.AddressTypeIPv6
	return es
}

func of(svc string, es *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	es.Labels[discoveryv1.LabelServiceName] = svc
	return es
}

// lines formats frontends, one a line: its key, its kind and Service, and its endpoints. Endpoints for clients outside follow a bar
// if they differ.
func lines(all []service.Frontend) []string {
	var list []string
	for _, f := range all {
		list = append(list, line(f))
	}
	return list
}

func line(f service.Frontend) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s %s ->%s", f.Key, f.Kind, f.PortName, backends(f.Inside))
	if f.Split() {
		fmt.Fprintf(&b, " |%s", backends(f.Outside))
	}
	if f.Affinity != 0 {
		fmt.Fprintf(&b, " affinity %s", f.Affinity)
	}
	if f.Sources != nil {
		fmt.Fprintf(&b, " from %v", f.Sources)
	}
	return b.String()
}

func backends(b service.Backends) string {
	switch {
	case len(b.Endpoints) > 0:
		var s strings.Builder
		for _, e := range b.Endpoints {
			s.WriteString(" " + e.String())
		}
		return s.String()
	case b.Drop:
		return " drop"
	}
	return " reject"
}

func sameLines(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n  %s\nwant:\n  %s", what, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

var nodeA = service.Node{Name: "a", Zone: "east", Addrs: []netip.Addr{netip.MustParseAddr("10.201.1.2")}}

func TestNodeOf(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{corev1.LabelTopologyZone: "east"}}}
	n.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeHostName, Address: "a"},
		{Type: corev1.NodeInternalIP, Address: "fd00::2"},
		{Type: corev1.NodeInternalIP, Address: "10.201.1.2"},
		{Type: corev1.NodeExternalIP, Address: "10.201.1.2"},
		{Type: corev1.NodeExternalIP, Address: "nonsense"},
	}
	got := svcfacts.Node(n)
	if want := "{a east [10.201.1.2 fd00::2]}"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// newModel returns a Model of a cluster that serves any external IP.
func newModel(node service.Node) *service.Model {
	m := service.NewModel(node)
	m.SetExternalIPs(service.ExternalIPs{Mode: netconf.ExternalIPsAny})
	return m
}
