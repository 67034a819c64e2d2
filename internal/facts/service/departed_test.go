package service

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestLife has an endpoint leave its Service in each of the ways in which one does.
func TestLife(t *testing.T) {
	const addr = "10.244.0.5"
	name := types.NamespacedName{Namespace: "default", Name: "web"}
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
		want   Life
	}{
		"it is one":                    {[]any{slice("web", 8080, endpoints{addr: ready})}, Life{Present: true, Serving: true}},
		"it terminates":                {[]any{slice("web", 8080, endpoints{addr: terminating})}, Life{Present: true, Serving: true}},
		"it is not ready":              {[]any{slice("web", 8080, endpoints{addr: unready})}, Life{Present: true}},
		"a selector moves on":          {[]any{slice("web", 8080, endpoints{addr: ready}), slice("web", 8080, endpoints{"10.244.0.6": ready})}, Life{}},
		"the port's number changes":    {[]any{slice("web", 8080, endpoints{addr: ready}), slice("web", 8081, endpoints{addr: ready})}, Life{}},
		"the Service is deleted":       {[]any{slice("web", 8080, endpoints{addr: ready}), "web-1"}, Life{}},
		"its pod is deleted":           {[]any{slice("web", 8080, endpoints{addr: terminating}), slice("web", 8080, nil)}, Life{Gone: true}},
		"its node has died":            {[]any{slice("web", 8080, endpoints{addr: unready}), slice("web", 8080, nil)}, Life{Gone: true}},
		"it was the last of the slice": {[]any{slice("web", 8080, endpoints{addr: terminating}), "web-1"}, Life{Gone: true}},
		"the next pod has the address": {[]any{slice("web", 8080, endpoints{addr: terminating}), slice("web", 8080, nil), slice("other", 80, endpoints{addr: ready})}, Life{}},
		"it was another Service's":     {[]any{slice("other", 80, endpoints{addr: terminating}), slice("other", 80, nil), slice("web", 8080, endpoints{addr: ready})}, Life{Present: true, Serving: true}},
	} {
		m := NewModel(Node{Name: "node-1"})
		for _, e := range tt.events {
			switch e := e.(type) {
			case *discoveryv1.EndpointSlice:
				m.SetSlice(e)
			case string:
				m.DeleteSlice(types.NamespacedName{Namespace: name.Namespace, Name: e})
			}
		}
		if got := m.Life(name, at); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", what, got, tt.want)
		}
	}
}

// TestDeparturesAreBounded has the oldest forgotten, also when an address goes again and again.
func TestDeparturesAreBounded(t *testing.T) {
	var d departures
	terminating := condition{terminating: true}
	one := func(i int) *slice {
		return &slice{endpoints: []endpoint{{addr: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), condition: terminating}}}
	}
	const n = 3 * departuresKept
	for i := range n {
		d.note(one(i), nil)
		d.note(one(i), nil)
	}
	if len(d.addrs) != departuresKept || len(d.order) != departuresKept || d.count != 2*n {
		t.Errorf("%d addresses, %d in order, %d counted", len(d.addrs), len(d.order), d.count)
	}
	for i, want := range map[int]bool{n - 1: true, n - departuresKept: true, n - departuresKept - 1: false} {
		if got := d.has(one(i).endpoints[0].addr); got != want {
			t.Errorf("the departure %d of %d is remembered: %t", i, n, got)
		}
	}
}

// TestTCPEnds is the one rule for what is balanced when it connects and for what connection tracking remembers.
func TestTCPEnds(t *testing.T) {
	x := NewIndex(stalePlan(), staleRanges, staleOthers)
	to, from := netip.MustParseAddrPort("10.96.0.10:53"), netip.MustParseAddrPort("10.244.9.9:53")
	for life, want := range map[Life]bool{
		{}: false, {Present: true}: false, {Present: true, Serving: true}: false, {Gone: true}: true,
	} {
		lives := func(Name, netip.AddrPort) Life { return life }
		if x.Ended(TCP, to, from, true, lives) != want || x.Cut(TCP, to, from, lives) != want {
			t.Errorf("%+v: by connection tracking %t, of sockets %t, want %t", life, x.Ended(TCP, to, from, true, lives), x.Cut(TCP, to, from, lives), want)
		}
		for what, ended := range map[string]bool{
			"not translated":                x.Ended(TCP, to, from, false, lives),
			"of no Service":                 x.Ended(TCP, netip.MustParseAddrPort("192.0.2.1:8080"), from, true, lives),
			"of a Service that was deleted": x.Cut(TCP, netip.MustParseAddrPort("10.96.0.99:53"), from, lives),
		} {
			if ended {
				t.Errorf("%+v: a connection that is %s is ended", life, what)
			}
		}
	}
}
