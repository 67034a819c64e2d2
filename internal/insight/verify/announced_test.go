package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// TestAnnounced says who announces an address, and if nobody does, why: each reason that there is.
func TestAnnounced(t *testing.T) {
	addr := netip.MustParseAddr("192.0.2.80")
	pools := vip.Read(vip.Objects{Pools: []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "office"}, Spec: v1alpha1.AddressPoolSpec{Addresses: []string{"192.0.2.80-192.0.2.89"}}}}})
	service := func(local bool, class string, ips ...string) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}
		if local {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
		if class != "" {
			s.Spec.LoadBalancerClass = &class
		}
		for _, ip := range ips {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip})
		}
		return s
	}
	has := vip.Assignment{Addresses: []netip.Addr{addr}, Pools: []string{"office"}}
	says := func(v vip.Verdict, routers ...answer.Router) answer.Balancers {
		v.Address = addr
		return answer.Balancers{Addresses: []vip.Verdict{v}, Routers: routers}
	}
	eth0, both := []string{"eth0"}, []string{"n1", "n2"}
	near := func(node, announcer string) answer.Balancers {
		return says(vip.Verdict{Devices: eth0, Eligible: both, Announcer: announcer, Answers: node == announcer, Routed: true})
	}
	far := func(routers ...answer.Router) answer.Balancers {
		return says(vip.Verdict{Eligible: both, Routed: true}, routers...)
	}
	told := func(state string) answer.Router {
		r := answer.Router{Peer: "rack", State: state, Selected: []netip.Addr{addr, netip.MustParseAddr("10.96.0.9")}}
		if r.Told = r.Selected; state != "Established" {
			r.Told, r.Message = nil, "refused"
		}
		return r
	}
	plain := func(spec corev1.ServiceSpec) *corev1.Service {
		spec.Type = corev1.ServiceTypeClusterIP
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: spec}
	}
	externalIPs := func(ips ...string) *corev1.Service { return plain(corev1.ServiceSpec{ExternalIPs: ips}) }
	clusterIPs := func(ips ...string) *corev1.Service { return plain(corev1.ServiceSpec{ClusterIPs: ips}) }
	broken := near("n1", "n1")
	broken.Problem = "listen for ARP: no"
	for name, tc := range map[string]struct {
		service  *corev1.Service
		assigned vip.Assignment
		accounts map[string]answer.Balancers
		failed   map[string]error
		want     string
	}{
		"one answers": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": near("n1", "n2"), "n2": near("n2", "n2")}, nil,
			"192.0.2.80 office [n2] []"},
		"two answer": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": near("n1", "n1"), "n2": near("n2", "n2")}, nil,
			"192.0.2.80 office [n1 n2] [] | several nodes answer"},
		"the node that should answer has no agent": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": near("n1", "n2")}, nil,
			"192.0.2.80 office [] [] | n2 should answer for it, but has no running agent | it is announced to no router"},
		"the node that should answer cannot be asked": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": near("n1", "n2")}, map[string]error{"n2": errors.New("gone")},
			"192.0.2.80 office [] [] | n2 should answer for it, but cannot be reached: gone | it is announced to no router"},
		"the node that should answer cannot": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": broken}, nil,
			"192.0.2.80 office [] [] | n1 should answer for it, but cannot: listen for ARP: no | it is announced to no router"},
		"no network of theirs": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": far(), "n2": far()}, nil,
			"192.0.2.80 office [] [] | no node answers for it: no node is on a network | it is announced to no router"},
		"a router": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{
			"n1": far(told("Established")), "n2": far(told("Active"))}, nil,
			"192.0.2.80 office [] [rack by n1, not n2: Active refused]"},
		"a router that is away": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": far(told("Active"))}, nil,
			"192.0.2.80 office [] [rack by none, not n1: Active refused] | no node answers for it: no node is on a network"},
		"a router that is told of other addresses": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": near("n1", "n1"), "n2": far(answer.Router{Peer: "rack", State: "Established"})}, nil,
			"192.0.2.80 office [n1] []"},
		"an external IP": {externalIPs("192.0.2.80", "198.51.100.1"), vip.Assignment{}, map[string]answer.Balancers{"n1": near("n1", "n1"), "n2": far(told("Established"))}, nil,
			"192.0.2.80 office [n1] [rack by n2]"},
		"an external IP that is not the Service's": {externalIPs("192.0.2.81"), vip.Assignment{}, map[string]answer.Balancers{"n1": near("n1", "n1")}, nil,
			"192.0.2.81 office [] [] | no agent announces it: it is not served, or AddressPool office is not for this Service"},
		"a ClusterIP that routers are told of, and one that they are not": {clusterIPs("10.96.0.10", "10.96.0.9"), vip.Assignment{}, map[string]answer.Balancers{"n1": far(told("Established")), "n2": far(told("Active"))}, nil,
			"10.96.0.9  [] [rack by n1, not n2: Active refused]"},
		"Local without endpoints": {service(true, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": says(vip.Verdict{Devices: eth0})}, nil,
			"192.0.2.80 office [] [] | externalTrafficPolicy is Local, and no living node has a ready endpoint"},
		"Local, endpoints elsewhere": {service(true, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": says(vip.Verdict{Devices: eth0, Eligible: []string{"n3"}})}, nil,
			"192.0.2.80 office [] [] | no node answers for it: none of the nodes on its network (n1) may take its packets, only n3 | it is announced to no router"},
		"nobody decided": {service(false, "", "192.0.2.80"), has, map[string]answer.Balancers{"n1": {Waiting: "Services are not known yet"}}, nil,
			"192.0.2.80 office [] [] | no agent that answered has a verdict on it | n1 waits: Services are not known yet"},
		"no agents":     {service(false, "", "192.0.2.80"), has, nil, nil, "192.0.2.80 office [] [] | no agent of Fathom's network runs"},
		"of no pool":    {service(false, "", "198.51.100.1"), vip.Assignment{}, nil, nil, "198.51.100.1  [] [] | it is in no AddressPool"},
		"pending":       {service(false, ""), vip.Assignment{Reason: vip.NoPool, Text: "there is no AddressPool"}, nil, nil, "  [] [] | NoAddressPool: there is no AddressPool"},
		"not written":   {service(false, ""), has, nil, nil, "  [] [] | it should have 192.0.2.80, but the controller has not written that"},
		"another class": {service(false, "example.com/x"), vip.Assignment{}, nil, nil, "  [] [] | its loadBalancerClass example.com/x is another controller's"},
		"one of two families": {service(false, "", "192.0.2.80"), vip.Assignment{Addresses: has.Addresses, Pools: has.Pools, Reason: vip.PoolExhausted, Text: "no IPv6 address is free"},
			map[string]answer.Balancers{"n1": near("n1", "n1")}, nil, "192.0.2.80 office [n1] []\n  [] [] | AddressPoolExhausted: no IPv6 address is free"},
	} {
		var lines []string
		for _, x := range announced(tc.service, tc.assigned, pools, tc.accounts, tc.failed) {
			line := fmt.Sprint(x.Address, " ", x.Pool, " ", x.Answered, " ", x.Routers)
			for _, why := range x.Why {
				line += " | " + why
			}
			lines = append(lines, line)
		}
		// Of each reason its beginning is enough.
		wants, matches := strings.Split(tc.want, "\n"), false
		if matches = len(wants) == len(lines); matches {
			for i := range wants {
				w, h := strings.Split(wants[i], " | "), strings.Split(lines[i], " | ")
				matches = matches && len(w) == len(h)
				for j := range min(len(w), len(h)) {
					matches = matches && strings.HasPrefix(h[j], w[j])
				}
			}
		}
		if !matches {
			t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(lines, "\n"), tc.want)
		}
	}
}

func FuzzAccount(f *testing.F) {
	addr := netip.MustParseAddr("192.0.2.80")
	pools := vip.Read(vip.Objects{Pools: []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "office"}, Spec: v1alpha1.AddressPoolSpec{Addresses: []string{"192.0.2.80-192.0.2.89"}}}}})
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer},
		Status: corev1.ServiceStatus{LoadBalancer: corev1.LoadBalancerStatus{Ingress: []corev1.LoadBalancerIngress{{IP: "192.0.2.80"}}}}}
	whole, err := json.Marshal(answer.Balancers{Addresses: []vip.Verdict{{Address: addr, Devices: []string{"eth0"}, Eligible: []string{"n1"}, Announcer: "n1", Answers: true}}, Routers: []answer.Router{{}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Fuzz(func(t *testing.T, data []byte) {
		var a answer.Balancers
		if json.Unmarshal(data, &a) == nil {
			announced(svc, vip.Assignment{Addresses: []netip.Addr{addr}, Pools: []string{"office"}}, pools, map[string]answer.Balancers{"n1": a, "n2": {}}, nil)
		}
	})
}
