package service_test

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

// TestLife: an endpoint leaves its Service in each of the possible ways.
func TestLife(t *testing.T) {
	const addr = "10.244.0.5"
	name := service.Name{Namespace: "default", Name: "web"}
	at := netip.MustParseAddrPort(addr + ":8080")
	ready := discoveryv1.EndpointConditions{Ready: new(true), Serving: new(true), Terminating: new(false)}
	unready := discoveryv1.EndpointConditions{Ready: new(false), Serving: new(false), Terminating: new(false)}
	terminating := discoveryv1.EndpointConditions{Ready: new(false), Serving: new(true), Terminating: new(true)}
	slice := func(of string, port int32, addrs map[string]discoveryv1.EndpointConditions) *discoveryv1.EndpointSlice {
		es := &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Namespace: name.Namespace, Name: of + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: of}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: new(""), Port: &port, Protocol: new(corev1.ProtocolTCP)}},
		}
		for a, c := range addrs {
			es.Endpoints = append(es.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: c})
		}
		return es
	}
	type endpoints = map[string]discoveryv1.EndpointConditions
	for what, tt := range map[string]struct {
		events []any // slices that come, or names of slices that go
		want   service.Life
	}{
		"it is one":                    {[]any{slice("web", 8080, endpoints{addr: ready})}, service.Life{Present: true, Serving: true}},
		"it terminates":                {[]any{slice("web", 8080, endpoints{addr: terminating})}, service.Life{Present: true, Serving: true}},
		"it is not ready":              {[]any{slice("web", 8080, endpoints{addr: unready})}, service.Life{Present: true}},
		"a selector moves on":          {[]any{slice("web", 8080, endpoints{addr: ready}), slice("web", 8080, endpoints{"10.244.0.6": ready})}, service.Life{}},
		"the port's number changes":    {[]any{slice("web", 8080, endpoints{addr: ready}), slice("web", 8081, endpoints{addr: ready})}, service.Life{}},
		"the Service is deleted":       {[]any{slice("web", 8080, endpoints{addr: ready}), "web-1"}, service.Life{}},
		"its pod is deleted":           {[]any{slice("web", 8080, endpoints{addr: terminating}), slice("web", 8080, nil)}, service.Life{Gone: true}},
		"its node has died":            {[]any{slice("web", 8080, endpoints{addr: unready}), slice("web", 8080, nil)}, service.Life{Gone: true}},
		"it was the last of the slice": {[]any{slice("web", 8080, endpoints{addr: terminating}), "web-1"}, service.Life{Gone: true}},
		"the next pod has the address": {[]any{slice("web", 8080, endpoints{addr: terminating}), slice("web", 8080, nil), slice("other", 80, endpoints{addr: ready})}, service.Life{}},
		"it was another Service's":     {[]any{slice("other", 80, endpoints{addr: terminating}), slice("other", 80, nil), slice("web", 8080, endpoints{addr: ready})}, service.Life{Present: true, Serving: true}},
	} {
		m := service.NewModel(service.Node{Name: "node-1"})
		for _, e := range tt.events {
			switch e := e.(type) {
			case *discoveryv1.EndpointSlice:
				m.SetSlice(svcfacts.Slice(e))
			case string:
				m.DeleteSlice(service.Name{Namespace: name.Namespace, Name: e})
			}
		}
		if got := m.Life(name, at); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", what, got, tt.want)
		}
	}
}
