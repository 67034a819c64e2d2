package service

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func TestLoadBalancers(t *testing.T) {
	m := NewModel(Node{Name: "n1"})
	says := func(step, want string, wantDiffers bool) {
		t.Helper()
		list, differs := m.LoadBalancers()
		if got := fmt.Sprint(list); got != want || differs != wantDiffers {
			t.Errorf("%s: %s, differs %v; want %s, %v", step, got, differs, want, wantDiffers)
		}
	}
	says("empty", "[]", false)
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop"}}
	s.Spec.Type, s.Spec.ClusterIP = corev1.ServiceTypeLoadBalancer, "10.96.0.9"
	s.Spec.Ports = []corev1.ServicePort{{Port: 80}}
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	m.SetService(s.DeepCopy())
	says("without addresses", "[]", false)
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.80"}}
	m.SetService(s.DeepCopy())
	says("without endpoints", "[{shop/web [192.0.2.80] true []}]", true)
	says("again", "[]", false)

	n1, n2, yes, no := "n1", "n2", true, false
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: "shop", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}}, AddressType: discoveryv1.AddressTypeIPv4}
	slice.Endpoints = []discoveryv1.Endpoint{
		{Addresses: []string{"10.244.2.2"}, NodeName: &n2},
		{Addresses: []string{"10.244.2.3"}, NodeName: &n2},
		{Addresses: []string{"10.244.1.2"}, NodeName: &n1, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}},
	}
	m.SetSlice(slice.DeepCopy())
	says("one is ready", "[{shop/web [192.0.2.80] true [n2]}]", true)
	slice.Endpoints = slice.Endpoints[2:]
	m.SetSlice(slice.DeepCopy())
	says("one is left, and ends", "[{shop/web [192.0.2.80] true [n1]}]", true)
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyCluster
	m.SetService(s.DeepCopy())
	says("anywhere", "[{shop/web [192.0.2.80] false []}]", true)
	m.DeleteService(types.NamespacedName{Namespace: "shop", Name: "web"})
	says("deleted", "[]", true)
}
