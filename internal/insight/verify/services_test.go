package verify_test

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

// TestSharedAddresses has Services share a load balancer's address, whose endpoints are on the same nodes or not.
func TestSharedAddresses(t *testing.T) {
	service := func(name string, policy corev1.ServiceExternalTrafficPolicy) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			ExternalTrafficPolicy: policy, Ports: []corev1.ServicePort{{Name: name, Port: 80, Protocol: corev1.ProtocolTCP}}}}
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.8"}}
		return s
	}
	slice := func(of string, nodes ...string) *discoveryv1.EndpointSlice {
		es := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: of, Labels: map[string]string{discoveryv1.LabelServiceName: of}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &of, Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}}}
		for _, n := range nodes {
			es.Endpoints = append(es.Endpoints, discoveryv1.Endpoint{Addresses: []string{"10.244.0.5"}, NodeName: &n})
		}
		return es
	}
	local, anywhere := corev1.ServiceExternalTrafficPolicyLocal, corev1.ServiceExternalTrafficPolicyCluster
	for name, tt := range map[string]struct {
		policy     corev1.ServiceExternalTrafficPolicy
		web, mail  []string
		wantA, bad string // what is said of node a, and the Service that it names
	}{
		"the same nodes":         {local, []string{"a", "b"}, []string{"a", "b"}, "", ""},
		"one node has both":      {local, []string{"a"}, []string{"a", "b"}, "", ""},
		"other nodes":            {local, []string{"a"}, []string{"b"}, "load balancer: packets for all Services that share 192.0.2.8 come to this node", "shop/mail"},
		"one has none":           {local, []string{"a"}, nil, "", ""},
		"a policy that is wider": {anywhere, []string{"a"}, []string{"b"}, "", ""},
	} {
		c := cluster()
		c.Services = []*corev1.Service{service("web", tt.policy), service("mail", tt.policy)}
		c.Slices = []*discoveryv1.EndpointSlice{slice("web", tt.web...), slice("mail", tt.mail...)}
		s := answer.Services{}
		s.Config.Mode = netconf.ProxyAuto
		var said []string
		for _, d := range verify.Services(c, "a", s) {
			if strings.HasPrefix(d.Text, "load balancer:") {
				said = append(said, d.Text)
			}
		}
		if (tt.wantA == "") != (len(said) == 0) || tt.wantA != "" && !slices.ContainsFunc(said, func(l string) bool { return strings.HasPrefix(l, tt.wantA) && strings.Contains(l, tt.bad) }) {
			t.Errorf("%s: %q", name, said)
		}
	}
}
