package verify

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// TestFromPod has a Service of both families and a node port met by a pod, and by one with the node's network.
func TestFromPod(t *testing.T) {
	addr := netip.MustParseAddr
	web := service.Name{Namespace: "default", Name: "web"}
	frontend := func(at string, p service.Protocol, of service.Name) service.Frontend {
		to := netip.MustParseAddrPort(at)
		e := service.Backends{Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.244.1.9:8080")}}
		if to.Addr().Is6() {
			e.Endpoints = []netip.AddrPort{netip.MustParseAddrPort("[fd00::9]:8080")}
		}
		return service.Frontend{Key: service.Key{Addr: to.Addr(), Port: to.Port(), Protocol: p}, Service: of, Inside: e, Outside: e}
	}
	plan := service.Plan{
		Frontends: []service.Frontend{
			frontend("0.0.0.0:30080", service.TCP, web), frontend("10.96.0.1:80", service.TCP, web), frontend("10.96.0.1:80", service.UDP, web),
			frontend("10.96.0.2:80", service.TCP, service.Name{Namespace: "default", Name: "other"}), frontend("[fd00:96::1]:80", service.TCP, web),
		},
		NodePortAddrs: []netip.Addr{addr("192.0.2.10"), addr("2001:db8::10")}, OwnPods: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")},
	}
	slices.SortFunc(plan.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	s := answer.Services{NFTables: plan, Connect: service.BalancedOf(plan)}
	for _, tc := range []struct {
		name string
		pod  FromPod
		s    answer.Services
		want string
	}{
		{"a pod of one family", FromPod{Addresses: []netip.Addr{addr("10.244.1.2")}}, s,
			"192.0.2.10:30080/TCP connected by connect(), 10.96.0.1:80/TCP connected by connect(), 10.96.0.1:80/UDP connected by prerouting, 10.96.0.1:80/UDP unconnected by connect()"},
		{"without programs at connect()", FromPod{Addresses: []netip.Addr{addr("10.244.1.2")}},
			answer.Services{NFTables: plan, Connect: s.Connect, Detached: []string{"fathom_connect4"}},
			"192.0.2.10:30080/TCP connected by prerouting, 10.96.0.1:80/TCP connected by prerouting, 10.96.0.1:80/UDP connected by prerouting, 10.96.0.1:80/UDP unconnected by prerouting"},
		{"IPv6", FromPod{Addresses: []netip.Addr{addr("fd00::2")}}, s, "[fd00:96::1]:80/TCP connected by connect()"},
		{"the node's network", FromPod{Addresses: []netip.Addr{addr("192.0.2.10")}, HostNetwork: true}, answer.Services{NFTables: plan},
			"192.0.2.10:30080/TCP connected by output, 127.0.0.1:30080/TCP connected by output, 10.96.0.1:80/TCP connected by output, 10.96.0.1:80/UDP connected by output, 10.96.0.1:80/UDP unconnected by output"},
	} {
		tc.pod.explain(web, tc.s, answer.Node{Pods: []podnet.PodEnd{{Device: "client", Routes: []netip.Addr{addr("10.244.1.2"), addr("fd00::2")}}}})
		var got []string
		for _, x := range tc.pod.Sent {
			hook := "nobody"
			for _, h := range x.Paths[0].Hops {
				if h.Object == "Service default/web" {
					hook = h.Hook
				}
			}
			got = append(got, x.To+"/"+x.Protocol+" "+x.Sender.String()+" by "+hook)
		}
		if all := strings.Join(got, ", "); all != tc.want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.name, all, tc.want)
		}
	}
}
