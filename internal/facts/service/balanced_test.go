package service_test

import (
	"fmt"
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

func TestLoadBalancers(t *testing.T) {
	m := service.NewModel(service.Node{Name: "n1"})
	says := func(step, want string, wantDiffers bool) {
		t.Helper()
		list, differs := m.LoadBalancers()
		var all []string
		for _, l := range list {
			all = append(all, fmt.Sprint(l.Service, l.Addrs, l.Local, l.Nodes))
		}
		if got := fmt.Sprint(all); got != want || differs != wantDiffers {
			t.Errorf("%s: %s, differs %v; want %s, %v", step, got, differs, want, wantDiffers)
		}
	}
	says("empty", "[]", false)
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop"}}
	s.Spec.Type, s.Spec.ClusterIP = corev1.ServiceTypeLoadBalancer, "10.96.0.9"
	s.Spec.Ports = []corev1.ServicePort{{Port: 80}}
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	m.SetService(svcfacts.Service(s.DeepCopy()))
	says("without addresses", "[]", false)
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.80"}}
	m.SetService(svcfacts.Service(s.DeepCopy()))
	says("without endpoints", "[shop/web [192.0.2.80] true []]", true)
	says("again", "[]", false)

	n1, n2, yes, no := "n1", "n2", true, false
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: "shop", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}, AddressType: discoveryv1.AddressTypeIPv4}
	slice.Endpoints = []discoveryv1.Endpoint{
		{Addresses: []string{"10.244.2.2"}, NodeName: &n2},
		{Addresses: []string{"10.244.2.3"}, NodeName: &n2},
		{Addresses: []string{"10.244.1.2"}, NodeName: &n1, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}},
	}
	m.SetSlice(svcfacts.Slice(slice.DeepCopy()))
	says("one is ready", "[shop/web [192.0.2.80] true [n2]]", true)
	slice.Endpoints = slice.Endpoints[2:]
	m.SetSlice(svcfacts.Slice(slice.DeepCopy()))
	says("one is left, and ends", "[shop/web [192.0.2.80] true [n1]]", true)
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	m.SetService(svcfacts.Service(s.DeepCopy()))
	says("anywhere", "[shop/web [192.0.2.80] false []]", true)
	m.DeleteService(service.Name{Namespace: "shop", Name: "web"})
	says("deleted", "[]", true)
}

// TestLedAddresses: LoadBalancers returns the external IPs that are served and that an AddressPool contains for the Service,
// whatever the mode. After SetClusterIPs it returns all ClusterIPs.
func TestLedAddresses(t *testing.T) {
	m := service.NewModel(service.Node{Name: "n1"})
	says := func(step, want string) {
		t.Helper()
		list, _ := m.LoadBalancers()
		var all []string
		for _, l := range list {
			all = append(all, fmt.Sprintf("%s{%s} %v %v %v %v %v %v", l.Service.Name, labels.Set(l.Labels), l.ExternalIPs, l.Local, l.Nodes, l.ClusterIPs, l.LocalInside, l.NodesInside))
		}
		if got := fmt.Sprint(all); got != want {
			t.Errorf("%s: %s, want %s", step, got, want)
		}
	}
	policy := func(mode netconf.ExternalIPs, namespaces map[string]bool) service.ExternalIPs {
		office := netip.MustParsePrefix("192.0.2.0/24")
		return service.ExternalIPs{Mode: mode, Pools: []service.ExternalIPPool{{Name: "office", Contains: office.Contains, Ranges: fmt.Sprint(office, namespaces), Namespaces: namespaces, Selects: func(map[string]string) bool { return true }}}}
	}
	local, n2 := corev1.ServiceInternalTrafficPolicyLocal, "n2"
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", Labels: map[string]string{"app": "web"}}}
	s.Spec.ClusterIP, s.Spec.ExternalIPs = "10.96.0.9", []string{"198.51.100.9", "192.0.2.9", "192.0.2.8"}
	s.Spec.Ports, s.Spec.ExternalTrafficPolicy = []corev1.ServicePort{{Port: 80}}, corev1.ServiceExternalTrafficPolicyLocal
	m.SetService(svcfacts.Service(s.DeepCopy()))
	es := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: "shop", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}, AddressType: discoveryv1.AddressTypeIPv4}
	es.Endpoints = []discoveryv1.Endpoint{{Addresses: []string{"10.244.2.2"}, NodeName: &n2}}
	m.SetSlice(svcfacts.Slice(es))
	says("no configuration yet", "[]")
	m.SetExternalIPs(policy(netconf.ExternalIPsAny, nil))
	says("any", "[web{app=web} [192.0.2.8 192.0.2.9] true [n2] [] false []]")
	m.SetExternalIPs(policy(netconf.ExternalIPsAny, map[string]bool{"blog": true}))
	says("any, and a pool for another namespace", "[]")
	m.SetExternalIPs(policy(netconf.ExternalIPsPools, map[string]bool{"shop": true}))
	says("of pools", "[web{app=web} [192.0.2.8 192.0.2.9] true [n2] [] false []]")
	other := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "other", Namespace: "shop"}}
	other.Spec.Type, other.Spec.ClusterIP, other.Spec.Ports = corev1.ServiceTypeLoadBalancer, "10.96.0.10", []corev1.ServicePort{{Port: 80}}
	other.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.8"}}
	m.SetService(svcfacts.Service(other))
	says("another Service was given one of them", "[other{} [] false [] [] false [] web{app=web} [192.0.2.9] true [n2] [] false []]")
	m.DeleteService(service.Name{Namespace: "shop", Name: "other"})
	m.SetExternalIPs(policy(netconf.ExternalIPsOff, nil))
	says("none", "[]")

	m.SetClusterIPs(true)
	says("ClusterIPs", "[web{app=web} [] false [] [10.96.0.9] false []]")
	s.Spec.InternalTrafficPolicy, s.Labels = &local, map[string]string{"app": "shop"}
	m.SetService(svcfacts.Service(s.DeepCopy()))
	says("of this node's alone, and other labels", "[web{app=shop} [] false [] [10.96.0.9] true [n2]]")
	m.SetClusterIPs(false)
	says("no ClusterIPs", "[]")
}
