package service_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

// policy is the policy of a cluster with one node, and with a pool that is for some namespaces.
func policy(mode netconf.ExternalIPs, namespaces ...string) service.ExternalIPs {
	reserved := func(cidr string, owner service.ReservedOwner, name string) service.Reserved {
		return service.Reserved{Prefix: netip.MustParsePrefix(cidr), Owner: owner, Name: name}
	}
	pool := netip.MustParsePrefix("192.0.2.0/28")
	x := service.ExternalIPs{Mode: mode, Reserved: []service.Reserved{
		reserved("10.201.1.1/32", service.ReservedNode, "a"), reserved("10.244.1.0/24", service.ReservedPodCIDR, "a"),
		reserved("10.244.1.7/32", service.ReservedNode, "tunnelled"), reserved("10.96.0.0/16", service.ReservedServiceCIDR, "kubernetes"),
		reserved("198.51.100.1/32", service.ReservedAPIServer, ""), reserved("fd00:244::/64", service.ReservedIPPool, "six"),
	}, Pools: []service.ExternalIPPool{{Name: "edge", Contains: pool.Contains, Ranges: pool.String(), Namespaces: map[string]bool{}, Selects: func(l map[string]string) bool { return l["edge"] == "yes" }}}}
	for _, n := range namespaces {
		x.Pools[0].Namespaces[n] = true
	}
	if slices.Contains(namespaces, "*") {
		x.Pools[0].Namespaces = nil
	}
	return x
}

func labelled(key, value string) change {
	return func(s *corev1.Service) { s.Labels = map[string]string{key: value} }
}

func TestExternalIPs(t *testing.T) {
	balancer := web(named("balancer", 2000), clusterIPs("10.97.0.9"), loadBalancer("203.0.113.20"))
	proxied := web(named("proxied", 2000), clusterIPs("10.97.0.10"), loadBalancer("203.0.113.21"))
	mode := corev1.LoadBalancerIPModeProxy
	proxied.Status.LoadBalancer.Ingress[0].IPMode = &mode
	foreign := web(named("foreign", 2000), clusterIPs("10.97.0.11"), labelled(service.LabelProxyName, "other"))
	api := web(named("kubernetes", 1), clusterIPs("10.96.0.1"))
	for name, tc := range map[string]struct {
		policy service.ExternalIPs
		ip     string
		more   []change
		want   string // the reason for a refusal; empty if it is served
	}{
		"any":                           {policy: policy(netconf.ExternalIPsAny), ip: "203.0.113.5"},
		"off":                           {policy: policy(netconf.ExternalIPsOff), ip: "203.0.113.5", want: "the setting externalIPs is off"},
		"nothing known":                 {ip: "203.0.113.5", want: "not known yet"},
		"node":                          {policy: policy(netconf.ExternalIPsAny), ip: "10.201.1.1", want: "the own address of node a"},
		"pod":                           {policy: policy(netconf.ExternalIPsAny), ip: "10.244.1.9", want: "an address of the pods of node a"},
		"node within pods":              {policy: policy(netconf.ExternalIPsAny), ip: "10.244.1.7", want: "the own address of node tunnelled"},
		"Service range":                 {policy: policy(netconf.ExternalIPsAny), ip: "10.96.77.1", want: "an address of ServiceCIDR kubernetes"},
		"API server, as reached":        {policy: policy(netconf.ExternalIPsAny), ip: "198.51.100.1", want: "the API server's address"},
		"API server, as it says":        {policy: policy(netconf.ExternalIPsAny), ip: "198.51.100.2", want: "the API server's address"},
		"another's ClusterIP":           {policy: policy(netconf.ExternalIPsAny), ip: "10.97.0.9", want: "the ClusterIP of Service default/balancer"},
		"another proxy's ClusterIP":     {policy: policy(netconf.ExternalIPsAny), ip: "10.97.0.11", want: "the ClusterIP of Service default/foreign"},
		"another's load balancer":       {policy: policy(netconf.ExternalIPsAny), ip: "203.0.113.20", want: "the load-balancer address of Service default/balancer"},
		"another's proxying balancer":   {policy: policy(netconf.ExternalIPsAny), ip: "203.0.113.21", want: "the load-balancer address of Service default/proxied"},
		"its own load balancer":         {policy: policy(netconf.ExternalIPsAny), ip: "203.0.113.22", more: []change{loadBalancer("203.0.113.22")}},
		"IPv6 pods":                     {policy: policy(netconf.ExternalIPsAny), ip: "fd00:244::9", more: []change{dual}, want: "an address of pods, of IPPool six"},
		"IPv6":                          {policy: policy(netconf.ExternalIPsAny), ip: "2001:db8::9", more: []change{dual}},
		"pool":                          {policy: policy(netconf.ExternalIPsPools, "default"), ip: "192.0.2.3", more: []change{labelled("edge", "yes")}},
		"pool of all":                   {policy: policy(netconf.ExternalIPsPools, "*"), ip: "192.0.2.3", more: []change{labelled("edge", "yes")}},
		"pool of other namespaces":      {policy: policy(netconf.ExternalIPsPools, "infra"), ip: "192.0.2.3", more: []change{labelled("edge", "yes")}, want: "AddressPool edge, which has it, is not for namespace default"},
		"pool of other Services":        {policy: policy(netconf.ExternalIPsPools, "default"), ip: "192.0.2.3", want: "AddressPool edge, which has it, is not for Services with these labels"},
		"no pool":                       {policy: policy(netconf.ExternalIPsPools, "default"), ip: "203.0.113.5", more: []change{labelled("edge", "yes")}, want: "no AddressPool has it"},
		"a pool does not make it legal": {policy: policy(netconf.ExternalIPsPools, "*"), ip: "10.201.1.1", more: []change{labelled("edge", "yes")}, want: "the own address of node a"},
	} {
		t.Run(name, func(t *testing.T) {
			m := service.NewModel(nodeA)
			m.SetExternalIPs(tc.policy)
			// The Service that asks is the oldest. Its age is no advantage.
			svc := web(append([]change{named("web", 1), clusterIPs("10.96.0.5"), externalIPs(tc.ip)}, tc.more...)...)
			if len(svc.Spec.ClusterIPs) > 1 {
				clusterIPs("10.96.0.5", "fd00:96::5")(svc)
			}
			m.SetService(svcfacts.Service(svc))
			m.Changes()
			for _, s := range []*corev1.Service{balancer, proxied, foreign, api} {
				m.SetService(svcfacts.Service(s))
			}
			m.SetSlice(svcfacts.Slice(of("kubernetes", slice("kubernetes", "https:6443", "198.51.100.2"))))
			served := slices.ContainsFunc(m.Frontends(), func(f service.Frontend) bool {
				return f.Service.Name == "web" && f.Addr == netip.MustParseAddr(tc.ip)
			})
			var why []string
			for _, p := range m.Problems() {
				if p.Refused {
					why = append(why, p.String())
				}
			}
			switch {
			case tc.want == "" && (!served || len(why) > 0):
				t.Errorf("served: %t, %q", served, why)
			case tc.want != "" && (served || len(why) != 1 || !strings.Contains(why[0], "Service default/web: externalIPs: "+tc.ip+" is not served: ") || !strings.Contains(why[0], tc.want)):
				t.Errorf("served: %t, because %q, want %q", served, why, tc.want)
			}
		})
	}
}

// TestExternalIPsFollow: which external IPs are served depends on other Services, but not on the order of events.
func TestExternalIPsFollow(t *testing.T) {
	m := service.NewModel(nodeA)
	m.SetExternalIPs(policy(netconf.ExternalIPsAny))
	m.SetService(svcfacts.Service(web(clusterIPs("10.96.0.5"), externalIPs("203.0.113.20"))))
	served := func(what string, want bool) {
		t.Helper()
		m.Changes()
		if got := slices.ContainsFunc(m.Frontends(), func(f service.Frontend) bool { return f.Service.Name == "web" && f.Kind == service.ExternalIP }); got != want {
			t.Errorf("%s: served %t, want %t", what, got, want)
		}
	}
	served("it is free", true)
	m.SetService(svcfacts.Service(web(named("balancer", 9000), clusterIPs("10.97.0.9"), loadBalancer("203.0.113.20"))))
	served("another got it as its load balancer's", false)
	m.SetService(svcfacts.Service(web(named("balancer", 9000), clusterIPs("10.97.0.9"), loadBalancer("203.0.113.21"))))
	served("that one moved", true)
	m.SetSlice(svcfacts.Slice(of("kubernetes", slice("kubernetes", "https:6443", "203.0.113.20"))))
	served("an API server says that it is there", false)
	m.DeleteSlice(nameOf("kubernetes"))
	served("and is gone", true)
	x := policy(netconf.ExternalIPsAny)
	x.PodsOnly = true
	m.SetExternalIPs(x)
	for _, f := range m.Frontends() {
		if f.PodsOnly != (f.Kind == service.ExternalIP) {
			t.Errorf("for pods only: %s is %t", line(f), f.PodsOnly)
		}
	}
	m.SetService(svcfacts.Service(web(named("balancer", 9000), clusterIPs("203.0.113.20"))))
	served("a Service got it as its ClusterIP", false)
	m.DeleteService(nameOf("balancer"))
	served("that Service is gone", true)
}

// TestExternalIPsShared: if two Services ask for one address, both get it at different ports, and the older one at the same port.
func TestExternalIPsShared(t *testing.T) {
	m := service.NewModel(nodeA)
	m.SetExternalIPs(policy(netconf.ExternalIPsAny))
	m.SetService(svcfacts.Service(web(named("old", 1), clusterIPs("10.96.0.5"), externalIPs("203.0.113.5"), ports("http:80"))))
	thief := web(named("new", 2), clusterIPs("10.96.0.6"), externalIPs("203.0.113.5"), ports("http:80", "https:443"))
	thief.ObjectMeta = metav1.ObjectMeta{Namespace: "other", Name: "new", CreationTimestamp: metav1.Unix(2, 0)}
	m.SetService(svcfacts.Service(thief))
	owner := map[uint16]string{}
	for _, f := range m.Frontends() {
		if f.Kind == service.ExternalIP {
			owner[f.Port] = f.Service.String()
		}
	}
	if len(owner) != 2 || owner[80] != "default/old" || owner[443] != "other/new" {
		t.Errorf("got %v", owner)
	}
	if p := m.Problems(); len(p) != 1 || p[0].Refused || !strings.Contains(p[0].String(), "other/new: 203.0.113.5:80/TCP belongs to Service default/old, which is older") {
		t.Errorf("problems: %v", p)
	}
}
