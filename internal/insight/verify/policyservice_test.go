package verify

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestExplainPolicyToService(t *testing.T) {
	pointer := func(n int32) *int32 { return &n }
	yes, no, port, tcp := true, false, "http", corev1.ProtocolTCP
	endpoint := func(ip string, ready *bool) discoveryv1.Endpoint {
		return discoveryv1.Endpoint{Addresses: []string{ip}, Conditions: discoveryv1.EndpointConditions{Ready: ready, Serving: ready}}
	}
	service := func(name, ip string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []corev1.IPFamily{"IPv4"},
			Ports: []corev1.ServicePort{{Name: "http", Protocol: tcp, Port: 80}}}}
	}
	slice := func(of string, all ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
		return &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: of + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: of}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &port, Protocol: &tcp, Port: pointer(8080)}}, Endpoints: all}
	}
	c := policyCluster()
	services := []*corev1.Service{service("web", "10.96.0.9"), service("direct", "None"), service("empty", "10.96.0.8")}
	all := []*discoveryv1.EndpointSlice{slice("web", endpoint("10.0.1.2", &yes), endpoint("10.0.1.3", &yes), endpoint("10.0.2.2", &no)), slice("direct", endpoint("10.0.1.2", &yes))}
	for _, tc := range []struct {
		from, to string
		want     []bool // of each endpoint
		port     uint16
		err      string
	}{
		{from: "b", to: "svc/web:80", want: []bool{false, true}, port: 8080}, // a hears c alone
		{from: "c", to: "svc/x/web:80/TCP", want: []bool{true, true}, port: 8080},
		{from: "c", to: "web.x.svc:80", want: []bool{true, true}, port: 8080},
		{from: "192.0.2.7", to: "web.x.svc.cluster.local.:80", want: []bool{true, true}, port: 8080},
		{from: "b", to: "service/direct:9000", want: []bool{false}, port: 9000},
		{from: "b", to: "svc/web", err: "name one of its ports"},
		{from: "b", to: "svc/web:80/UDP", err: "has no port 80/UDP"},
		{from: "b", to: "svc/nothing:80", err: "there is no Service x/nothing"},
		{from: "b", to: "svc/empty:80", err: "has no endpoint"},
		{from: "nobody", to: "svc/web:80", err: "there is no Pod x/nobody"},
		{from: "svc/web", to: "b:80", err: "want a Pod"},
		{from: "b", to: "svc/:80", err: "want a Pod"},
	} {
		q, err := ParsePolicyQuery(tc.from, tc.to, "x")
		var got []bool
		if err == nil {
			list, explained := ExplainPolicyToService(c, q, services, all)
			err = explained
			for _, e := range list {
				if got = append(got, e.Allowed); e.Port != tc.port || e.Service == "" {
					t.Errorf("%s to %s: port %d of Service %q, want %d", tc.from, tc.to, e.Port, e.Service, tc.port)
				}
			}
		}
		ok := len(got) == len(tc.want) && (err == nil) == (tc.err == "") && (err == nil || strings.Contains(err.Error(), tc.err))
		for i := range got {
			ok = ok && got[i] == tc.want[i]
		}
		if !ok {
			t.Errorf("%s to %s: %v, %v, want %v, %q", tc.from, tc.to, got, err, tc.want, tc.err)
		}
	}
}
