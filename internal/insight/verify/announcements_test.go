package verify_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

// TestAnnouncements: of a Service with externalTrafficPolicy: Local, whose endpoint is on node b, node a is asked who answers
// for the address.
func TestAnnouncements(t *testing.T) {
	c := cluster()
	for _, n := range c.Nodes {
		n.Annotations = map[string]string{netfacts.ModeAnnotation: "direct"}
	}
	web := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeLoadBalancer, ClusterIP: "10.96.0.1", ClusterIPs: []string{"10.96.0.1"}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
		ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal, Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}}}}
	web.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "10.0.0.80"}}
	c.Services = []*corev1.Service{web}
	c.Slices = []*discoveryv1.EndpointSlice{{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: new(""), Port: new(int32(8080)), Protocol: new(corev1.ProtocolTCP)}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.244.1.2"}, NodeName: new("b")}}}}
	c.AddressPools = []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "office"}, Spec: v1alpha1.AddressPoolSpec{Addresses: []string{"10.0.0.80-10.0.0.89"}}}}
	const address = "load balancer: 10.0.0.80 is "
	by := func(node, more string) string {
		return "answered for by " + node + " on [eth0]" + more + ", and may come to "
	}
	for name, tt := range map[string]struct {
		change func(*answer.Balancers)
		want   string
	}{
		"as it should be": {func(*answer.Balancers) {}, ""},
		"it answers itself": {func(a *answer.Balancers) { a.Addresses[0].Announcer, a.Addresses[0].Answers = "a", true },
			address + by("this node", "") + "[b], want " + by("node b", "") + "[b]"},
		"another may have it, too": {func(a *answer.Balancers) { a.Addresses[0].Eligible = []string{"a", "b"} },
			address + by("node b", "") + "[a b], want " + by("node b", "") + "[b]"},
		"one that it takes for dead": {func(a *answer.Balancers) { a.Alive = []string{"a"} },
			address + by("node b", "") + "[b], want " + by("no node here", "") + "[]"},
		"whose agent is away": {func(a *answer.Balancers) { a.Away = []string{"b"} },
			address + by("node b", "") + "[b], want " + by("node b", ", for which a stands in") + "[b]"},
		"nothing decided": {func(a *answer.Balancers) { a.Addresses = nil },
			"load balancer: the agent has not decided which node answers for 10.0.0.80, want " + by("node b", "") + "[b]"},
		"of no Service": {func(a *answer.Balancers) {
			a.Addresses = append(a.Addresses, vip.Verdict{Address: netip.MustParseAddr("10.0.0.81"), Devices: []string{"eth0"}})
		}, "load balancer: 10.0.0.81 is " + by("no node here", "") + "[], but no Service has it from an AddressPool"},
		"the kernel refuses": {func(a *answer.Balancers) { a.Problem = "no socket" }, "load balancer: the agent answers for no address: no socket"},
		"it waits":           {func(a *answer.Balancers) { *a = answer.Balancers{Waiting: "for Services"} }, ""},
	} {
		for _, mode := range []netconf.ServiceProxy{netconf.ProxyAuto, netconf.ProxyOff} {
			a := answer.Balancers{Alive: []string{"a", "b"}, Segments: podnet.Segments([]podnet.Interface{{Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}}}),
				Addresses: []vip.Verdict{{Address: netip.MustParseAddr("10.0.0.80"), Devices: []string{"eth0"}, Eligible: []string{"b"}, Announcer: "b"}}}
			tt.change(&a)
			s := answer.Services{Balancers: &a}
			s.Config.Mode = mode
			var said []string
			for _, d := range verify.Services(c, "a", s) {
				if strings.HasPrefix(d.Text, "load balancer:") {
					said = append(said, d.Text)
				}
			}
			if want := slices.DeleteFunc([]string{tt.want}, func(s string) bool { return s == "" }); !slices.Equal(said, want) {
				t.Errorf("%s, mode %s: %q, want %q", name, mode, said, want)
			}
		}
	}
}
