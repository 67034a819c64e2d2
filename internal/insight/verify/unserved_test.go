package verify_test

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestUnserved compares where nodes refuse what is for no Service with the objects.
func TestUnserved(t *testing.T) {
	svc := func(name, clusterIP, balancer string, labels map[string]string) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Labels: labels}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, ClusterIP: clusterIP, ClusterIPs: []string{clusterIP}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP}}}}
		if balancer != "" {
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: balancer}}
		}
		return s
	}
	c := cluster()
	c.Services = []*corev1.Service{
		svc("web", "10.96.0.1", "192.0.2.80", nil),
		svc("mail", "10.96.0.2", "203.0.113.5", nil), // by another controller
		svc("mesh", "10.96.0.77", "", map[string]string{service.LabelProxyName: "mesh"}),
	}
	c.AddressPools = []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "office"}, Spec: v1alpha1.AddressPoolSpec{Addresses: []string{"192.0.2.80-192.0.2.89"}}}}
	c.ServiceCIDRs = []*networkingv1.ServiceCIDR{{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/16", "fd00:96::/112"}}}}
	good := service.Unserved{
		Ranges:        []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:96::/112")},
		LoadBalancers: []netip.Addr{netip.MustParseAddr("192.0.2.80")}, Others: []netip.Addr{netip.MustParseAddr("10.96.0.77")},
		Node: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
	}
	const table = "nftables: table inet fathom-unserved: "
	for name, tt := range map[string]struct {
		mode   netconf.ServiceProxy
		change func(u *service.Unserved) *service.Unserved
		want   []string
	}{
		"as it should be": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved { return u }, nil},
		"no table": {netconf.ProxyNFTables, func(*service.Unserved) *service.Unserved { return nil },
			[]string{"nftables: table inet fathom-unserved, which refuses packets for unused addresses of Services, is missing, or its rules are wrong"}},
		"one range less": {netconf.ProxyNFTables, func(u *service.Unserved) *service.Unserved { u.Ranges = u.Ranges[1:]; return u },
			[]string{table + "packets for unused addresses in 10.96.0.0/16 are not refused"}},
		"one range more": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved {
			u.Ranges = append(u.Ranges, netip.MustParsePrefix("198.51.100.0/24"))
			return u
		}, []string{table + "packets for 198.51.100.0/24 are refused, which is in no range of Services and no pool"}},
		"another controller's address": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved {
			u.LoadBalancers = append(u.LoadBalancers, netip.MustParseAddr("203.0.113.5"))
			return u
		}, []string{table + "packets for 203.0.113.5/32 are refused, which is in no range of Services and no pool", table + "pings of 203.0.113.5 are answered, which no Service has from an AddressPool"}},
		"no load balancer's address": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved { u.LoadBalancers = nil; return u },
			[]string{table + "packets for unused addresses in 192.0.2.80/32 are not refused", table + "pings of 192.0.2.80 are not answered, which a Service has from an AddressPool"}},
		"not the other proxy's": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved {
			u.Others = []netip.Addr{netip.MustParseAddr("10.96.0.78")}
			return u
		}, []string{table + "10.96.0.77 is not left to the other proxy, which carries its Service", table + "10.96.0.78 is left to another proxy, which has no Service there"}},
		"another address of the node": {netconf.ProxyAuto, func(u *service.Unserved) *service.Unserved {
			u.Node = []netip.Addr{netip.MustParseAddr("10.0.0.9")}
			return u
		}, []string{table + "pings are answered by [10.0.0.9], want [10.0.0.1]"}},
		"not to carry Services": {netconf.ProxyOff, func(u *service.Unserved) *service.Unserved { return u },
			[]string{"it should not carry Services, but its kernel refuses packets for unused addresses of Services: nftables table inet fathom-unserved"}},
		"nor does it": {netconf.ProxyOff, func(*service.Unserved) *service.Unserved { return nil }, nil},
	} {
		u := good
		u.Ranges = slices.Clone(good.Ranges)
		sent := answer.Services{}
		sent.Config.Mode = tt.mode
		if changed := tt.change(&u); changed != nil {
			held := service.UnservedAsHeld(*changed)
			sent.Unserved = &held
		}
		wire, err := json.Marshal(sent) // as agents tell it
		testenv.Must(t, err)
		var s answer.Services
		testenv.Must(t, json.Unmarshal(wire, &s))
		var said []string
		for _, d := range verify.Services(c, "a", s) {
			if strings.Contains(d.Text, "fathom-unserved") {
				said = append(said, d.Text)
			}
		}
		slices.Sort(said)
		if !slices.Equal(said, tt.want) {
			t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(said, "\n"), strings.Join(tt.want, "\n"))
		}
	}
}
