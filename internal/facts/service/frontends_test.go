package service_test

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

type endpointSlices = []*discoveryv1.EndpointSlice

// one has an endpoint on this node and one on another, for most cases.
var one = endpointSlices{slice("s", "http:8080", "10.244.1.2 on=a", "10.244.2.2 on=b")}

var two = endpointSlices{one[0], slice6("s6", "http:8080", "fd00:244:1::2 on=a", "fd00:244:2::2 on=b")}

const both = "-> 10.244.1.2:8080 10.244.2.2:8080"
const both6 = "-> [fd00:244:1::2]:8080 [fd00:244:2::2]:8080"

func TestAddresses(t *testing.T) {
	proxied := ipMode(corev1.LoadBalancerIPModeProxy)
	for _, tc := range []struct {
		name   string
		svc    *corev1.Service
		slices endpointSlices
		want   []string
	}{
		{"a ClusterIP", web(), one, []string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"both families, each with its own endpoints", web(dual), two, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"[fd00:96::1]:80/TCP ClusterIP http " + both6,
		}},
		{"a family without endpoints rejects", web(dual), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"[fd00:96::1]:80/TCP ClusterIP http -> reject",
		}},
		{"an old Service without clusterIPs and ipFamilies", web(func(s *corev1.Service) { s.Spec.ClusterIPs, s.Spec.IPFamilies = nil, nil }), one,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"zeros before numbers, of old objects", web(clusterIPs("010.096.000.001")), one, []string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"headless", web(clusterIPs("None")), one, nil},
		{"no ClusterIP yet", web(clusterIPs("")), one, nil},
		{"an ExternalName that is an address, which is a name to DNS alone", web(typed(corev1.ServiceTypeExternalName), clusterIPs(""), func(s *corev1.Service) { s.Spec.ExternalName = "10.0.0.1" }), one, nil},
		{"an ExternalName", web(typed(corev1.ServiceTypeExternalName)), one, nil},
		{"another proxy's", web(label("service.kubernetes.io/service-proxy-name")), one, nil},
		{"said to be headless", web(label(corev1.IsHeadlessService)), one, nil},
		{"no ports", web(ports()), one, nil},
		{"a NodePort, besides the ClusterIP", web(nodePort), one, []string{
			"0.0.0.0:30080/TCP NodePort http " + both,
			"10.96.0.1:80/TCP ClusterIP http " + both,
		}},
		{"a NodePort of both families", web(nodePort, dual), two, []string{
			"0.0.0.0:30080/TCP NodePort http " + both,
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"[::]:30080/TCP NodePort http " + both6,
			"[fd00:96::1]:80/TCP ClusterIP http " + both6,
		}},
		{"a NodePort of IPv6 alone", web(nodePort, clusterIPs("fd00:96::1")), two, []string{
			"[::]:30080/TCP NodePort http " + both6,
			"[fd00:96::1]:80/TCP ClusterIP http " + both6,
		}},
		{"a NodePort of a Service that no longer has one", web(nodePort, typed(corev1.ServiceTypeClusterIP)), one,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"a load balancer without NodePorts", web(loadBalancer("203.0.113.1")), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"203.0.113.1:80/TCP LoadBalancer http " + both,
		}},
		{"a load balancer that has no address yet", web(loadBalancer("")), one, []string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"a load balancer's address, ipMode: VIP", web(loadBalancer("203.0.113.1"), ipMode(corev1.LoadBalancerIPModeVIP)), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"203.0.113.1:80/TCP LoadBalancer http " + both,
		}},
		{"ipMode: Proxy is the load balancer's business", web(loadBalancer("203.0.113.1"), proxied), one,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"the address of a load balancer that is no longer one", web(loadBalancer("203.0.113.1"), typed(corev1.ServiceTypeClusterIP)), one,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"an external IP", web(externalIPs("192.0.2.7")), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"192.0.2.7:80/TCP ExternalIP http " + both,
		}},
		{"an external IP of a family that the Service lacks", web(externalIPs("2001:db8::7")), two,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
		{"one address, twice an external IP and once the load balancer's", web(loadBalancer("192.0.2.7"), externalIPs("192.0.2.7", "192.0.2.7"), sources("198.51.100.0/24")), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"192.0.2.7:80/TCP LoadBalancer http " + both + " from [198.51.100.0/24]",
		}},
		{"ranges with white space and zeros, of old objects", web(loadBalancer("192.0.2.7"), sources(" 198.051.100.0/24 ", "198.51.100.0/24")), one, []string{
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"192.0.2.7:80/TCP LoadBalancer http " + both + " from [198.51.100.0/24]",
		}},
		{"addresses that no Service can have", web(externalIPs("127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.169.254", "nonsense", "fe80::1%eth0")), one,
			[]string{"10.96.0.1:80/TCP ClusterIP http " + both}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(tc.svc), svcfacts.Slices(tc.slices), nodeA)), tc.want)
		})
	}
}

func TestPorts(t *testing.T) {
	for _, tc := range []struct {
		name   string
		ports  change
		slices endpointSlices
		want   []string
	}{
		{"several, by their names", ports("http:80", "admin:81"), endpointSlices{slice("s", "admin:9000 http:8080", "10.244.1.2")}, []string{
			"10.96.0.1:80/TCP ClusterIP http -> 10.244.1.2:8080",
			"10.96.0.1:81/TCP ClusterIP admin -> 10.244.1.2:9000",
		}},
		{"TCP and UDP at one number", ports("dns:53/UDP", "dns-tcp:53/TCP"), endpointSlices{slice("s", "dns:53/UDP dns-tcp:53/TCP", "10.244.1.2")}, []string{
			"10.96.0.1:53/TCP ClusterIP dns-tcp -> 10.244.1.2:53",
			"10.96.0.1:53/UDP ClusterIP dns -> 10.244.1.2:53",
		}},
		{"SCTP", ports("sig:36412/SCTP"), endpointSlices{slice("s", "sig:36412/SCTP", "10.244.1.2")},
			[]string{"10.96.0.1:36412/SCTP ClusterIP sig -> 10.244.1.2:36412"}},
		{"of one name, but another protocol", ports("dns:53/UDP"), endpointSlices{slice("s", "dns:53/TCP", "10.244.1.2")},
			[]string{"10.96.0.1:53/UDP ClusterIP dns -> reject"}},
		{"of no name", ports(":80"), endpointSlices{slice("s", ":8080", "10.244.1.2")},
			[]string{"10.96.0.1:80/TCP ClusterIP  -> 10.244.1.2:8080"}},
		{"of another name", ports("http:80"), endpointSlices{slice("s", "web:8080", "10.244.1.2")},
			[]string{"10.96.0.1:80/TCP ClusterIP http -> reject"}},
		{"a named target port that differs from pod to pod", ports("http:80"), endpointSlices{slice("s1", "http:8080", "10.244.1.2"), slice("s2", "http:8081", "10.244.1.3")},
			[]string{"10.96.0.1:80/TCP ClusterIP http -> 10.244.1.2:8080 10.244.1.3:8081"}},
		{"one that a slice gives no number", ports("http:80"), endpointSlices{slice("s", "http", "10.244.1.2")},
			[]string{"10.96.0.1:80/TCP ClusterIP http -> reject"}},
		{"the number 0 in a slice", ports("http:80"), endpointSlices{slice("s", "http:0", "10.244.1.2")},
			[]string{"10.96.0.1:80/TCP ClusterIP http -> reject"}},
		{"what is no port", ports("http:80", "a:0", "b:65536", "c:82/ICMP"), one, []string{"10.96.0.1:80/TCP ClusterIP http " + both}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(web(tc.ports)), svcfacts.Slices(tc.slices), nodeA)), tc.want)
		})
	}
}

func TestEndpoints(t *testing.T) {
	unlabelled := func(change func(*discoveryv1.EndpointSlice)) endpointSlices {
		es := slice("s", "http:8080", "10.244.1.2")
		change(es)
		return endpointSlices{es}
	}
	for _, tc := range []struct {
		name      string
		slices    endpointSlices
		endpoints string
	}{
		{"none", nil, " reject"},
		{"sorted, of all slices", endpointSlices{slice("s1", "http:8080", "10.244.1.10", "10.244.1.9"), slice("s2", "http:8080", "10.244.1.1")},
			" 10.244.1.1:8080 10.244.1.9:8080 10.244.1.10:8080"},
		{"once, if in two slices", endpointSlices{slice("s1", "http:8080", "10.244.1.2"), slice("s2", "http:8080", "10.244.1.2")}, " 10.244.1.2:8080"},
		{"an address that a dying pod left to a new one", endpointSlices{slice("s1", "http:8080", "10.244.1.2 unready serving terminating", "10.244.1.2 ready")}, " 10.244.1.2:8080"},
		{"without anything said, they are ready", endpointSlices{slice("s", "http:8080", "10.244.1.2")}, " 10.244.1.2:8080"},
		{"not ready", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready", "10.244.1.3 ready")}, " 10.244.1.3:8080"},
		{"none ready", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready")}, " reject"},
		{"not ready, but published all the same: the slice says ready", endpointSlices{slice("s", "http:8080", "10.244.1.2 ready unserving terminating")}, " 10.244.1.2:8080"},
		{"terminating ones, while others are ready", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready serving terminating", "10.244.1.3")}, " 10.244.1.3:8080"},
		{"terminating ones, once there are no others", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready serving terminating", "10.244.1.3 unready")}, " 10.244.1.2:8080"},
		{"terminating ones that do not say that they serve", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready terminating")}, " 10.244.1.2:8080"},
		{"terminating ones that serve no longer", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready unserving terminating")}, " reject"},
		{"serving ones that are neither ready nor terminating", endpointSlices{slice("s", "http:8080", "10.244.1.2 unready serving")}, " reject"},
		{"addresses that no endpoint can have", endpointSlices{slice("s", "http:8080", "127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.169.254", "nonsense", "fd00::1", "10.244.1.2")}, " 10.244.1.2:8080"},
		{"of several addresses the first", unlabelled(func(es *discoveryv1.EndpointSlice) {
			es.Endpoints[0].Addresses = []string{"10.244.1.7", "10.244.1.2"}
		}), " 10.244.1.7:8080"},
		{"no address", unlabelled(func(es *discoveryv1.EndpointSlice) { es.Endpoints[0].Addresses = nil }), " reject"},
		{"in a slice of names", unlabelled(func(es *discoveryv1.EndpointSlice) { es.AddressType = discoveryv1.AddressTypeFQDN }), " reject"},
		{"in a slice of the other family", unlabelled(func(es *discoveryv1.EndpointSlice) { es.AddressType = discoveryv1.AddressTypeIPv6 }), " reject"},
		{"in another Service's slice", endpointSlices{of("other", slice("s", "http:8080", "10.244.1.2"))}, " reject"},
		{"in another namespace's slice", unlabelled(func(es *discoveryv1.EndpointSlice) { es.Namespace = "other" }), " reject"},
		{"in a slice of no Service", unlabelled(func(es *discoveryv1.EndpointSlice) { es.Labels = nil }), " reject"},
		{"in a slice that is said to be headless", unlabelled(func(es *discoveryv1.EndpointSlice) { es.Labels[corev1.IsHeadlessService] = "" }), " reject"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			svc := web()
			svc.Spec.Selector = nil // as with manually written endpoints: it makes no difference
			sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(svc), svcfacts.Slices(tc.slices), nodeA)), []string{"10.96.0.1:80/TCP ClusterIP http ->" + tc.endpoints})
		})
	}
}

func TestTopology(t *testing.T) {
	zones := []string{"10.244.1.2 zones=east", "10.244.2.2 zones=west,north", "10.244.3.2 zones=west,east"}
	nodes := []string{"10.244.1.2 nodes=a zones=east", "10.244.2.2 nodes=b zones=west", "10.244.3.2 nodes=c,a zones=west"}
	const all = " 10.244.1.2:8080 10.244.2.2:8080 10.244.3.2:8080"
	for _, tc := range []struct {
		name      string
		node      service.Node
		hints     []string
		endpoints string
	}{
		{"those for the zone", nodeA, zones, " 10.244.1.2:8080 10.244.3.2:8080"},
		{"the second of two zones", service.Node{Name: "a", Zone: "north"}, zones, " 10.244.2.2:8080"},
		{"a zone's name within another's", service.Node{Name: "a", Zone: "eas"}, zones, all},
		{"a zone without any", service.Node{Name: "a", Zone: "south"}, zones, all},
		{"a node whose zone is not known", service.Node{Name: "a"}, zones, all},
		{"a ready endpoint without a hint", nodeA, []string{zones[0], zones[1], "10.244.3.2"}, all},
		{"an endpoint without a hint that is not ready", nodeA, []string{zones[0], zones[1], "10.244.3.2 unready"}, " 10.244.1.2:8080"},
		{"the zone's only one is not ready", nodeA, []string{zones[0] + " unready", zones[1], "10.244.3.2 zones=west"}, " 10.244.2.2:8080 10.244.3.2:8080"},
		{"none ready: those that terminate, of all zones", nodeA, []string{zones[0] + " unready", zones[1] + " unready terminating"}, " 10.244.2.2:8080"},
		{"those for the node come before the zone's", nodeA, nodes, " 10.244.1.2:8080 10.244.3.2:8080"},
		{"none for the node: the zone's", service.Node{Name: "d", Zone: "west"}, nodes, " 10.244.2.2:8080 10.244.3.2:8080"},
		{"none for the node, nor for the zone", service.Node{Name: "d", Zone: "south"}, nodes, all},
		{"one without a hint for nodes: the zone's", nodeA, []string{nodes[0], nodes[1], "10.244.3.2 zones=west"}, " 10.244.1.2:8080"},
		{"a node that is not known", service.Node{}, nodes, all},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := service.Frontends(svcfacts.Service(web()), svcfacts.Slices(endpointSlices{slice("s", "http:8080", tc.hints...)}), tc.node)
			sameLines(t, "frontends", lines(got), []string{"10.96.0.1:80/TCP ClusterIP http ->" + tc.endpoints})
		})
	}
}

func TestPolicies(t *testing.T) {
	elsewhere := endpointSlices{slice("s", "http:8080", "10.244.2.2 on=b")}
	dying := endpointSlices{slice("s", "http:8080", "10.244.1.2 on=a unready serving terminating", "10.244.2.2 on=b")}
	for _, tc := range []struct {
		name                string
		changes             change
		slices              endpointSlices
		clusterIP, external string
	}{
		{"Cluster", nil, one, both, both},
		{"external Local: from inside any, from outside the node's own", externalLocal, one, both, both + " | 10.244.1.2:8080"},
		{"external Local, endpoints elsewhere: dropped", externalLocal, elsewhere, "-> 10.244.2.2:8080", "-> 10.244.2.2:8080 | drop"},
		{"external Local, no endpoints at all: rejected", externalLocal, nil, "-> reject", "-> reject"},
		{"external Local, none ready, one terminates elsewhere: dropped", externalLocal,
			endpointSlices{slice("s", "http:8080", "10.244.2.2 on=b unready terminating")}, "-> 10.244.2.2:8080", "-> 10.244.2.2:8080 | drop"},
		{"external Local, the node's own one terminates: it serves on", externalLocal, dying, "-> 10.244.2.2:8080", "-> 10.244.2.2:8080 | 10.244.1.2:8080"},
		{"external Local, and another zone's hint: the policy counts", externalLocal,
			endpointSlices{slice("s", "http:8080", "10.244.1.2 on=a zones=west", "10.244.2.2 on=b zones=east")}, "-> 10.244.2.2:8080", "-> 10.244.2.2:8080 | 10.244.1.2:8080"},
		{"external Local, an endpoint that is on no node", externalLocal, endpointSlices{slice("s", "http:8080", "10.244.2.2")}, "-> 10.244.2.2:8080", "-> 10.244.2.2:8080 | drop"},
		{"internal Local: the ClusterIP's alone", internalLocal, one, "-> 10.244.1.2:8080", both},
		{"internal Local, endpoints elsewhere: dropped", internalLocal, elsewhere, "-> drop", "-> 10.244.2.2:8080"},
		{"internal Local, no endpoints at all: rejected", internalLocal, nil, "-> reject", "-> reject"},
		{"internal Local, the node's own one terminates: it serves on", internalLocal, dying, "-> 10.244.1.2:8080", "-> 10.244.2.2:8080"},
		{"both Local", func(s *corev1.Service) { internalLocal(s); externalLocal(s) }, one, "-> 10.244.1.2:8080", both + " | 10.244.1.2:8080"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			changes := []change{loadBalancer("203.0.113.1"), externalIPs("203.0.113.2"), ports("http:80:30080")}
			if tc.changes != nil {
				changes = append(changes, tc.changes)
			}
			sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(web(changes...)), svcfacts.Slices(tc.slices), nodeA)), []string{
				"0.0.0.0:30080/TCP NodePort http " + tc.external,
				"10.96.0.1:80/TCP ClusterIP http " + tc.clusterIP,
				"203.0.113.1:80/TCP LoadBalancer http " + tc.external,
				"203.0.113.2:80/TCP ExternalIP http " + tc.external,
			})
		})
	}
}

func TestAffinityAndSources(t *testing.T) {
	lb := loadBalancer("203.0.113.1", "2001:db8::1")
	for _, tc := range []struct {
		name                           string
		changes                        []change
		clusterIP, balanced, balanced6 string // what follows the endpoints
	}{
		{"neither", nil, "", "", ""},
		{"affinity of the usual time", []change{affinity(0)}, " affinity 3h0m0s", " affinity 3h0m0s", " affinity 3h0m0s"},
		{"affinity of another time", []change{affinity(60)}, " affinity 1m0s", " affinity 1m0s", " affinity 1m0s"},
		{"sources, sorted, each once, without bits of hosts", []change{sources("198.51.100.7/24", "192.0.2.0/24", " 198.51.100.0/24 ", "2001:db8:1::/48")}, "",
			" from [192.0.2.0/24 198.51.100.0/24]", " from [2001:db8:1::/48]"},
		{"a family that is not named has none", []change{sources("192.0.2.0/24")}, "", " from [192.0.2.0/24]", " from []"},
		{"everyone of one family", []change{sources("192.0.2.0/24", "0.0.0.0/0")}, "", "", " from []"},
		{"everyone", []change{sources("0.0.0.0/0", "::/0")}, "", "", ""},
		{"nothing that could be read", []change{sources("nonsense", "192.0.2.0/33", "192.0.2.1")}, "", " from []", " from []"},
		{"as one wrote it formerly", []change{oldSources(" 192.0.2.0/24, 2001:db8:1::/48 ")}, "", " from [192.0.2.0/24]", " from [2001:db8:1::/48]"},
		{"written formerly, without anything", []change{oldSources(" ")}, "", "", ""},
		{"written in both ways", []change{oldSources("192.0.2.0/24"), sources("198.51.100.0/24", "::/0")}, "", " from [198.51.100.0/24]", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			svc := web(append([]change{dual, lb, ports("http:80")}, tc.changes...)...)
			sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(svc), svcfacts.Slices(two), nodeA)), []string{
				"10.96.0.1:80/TCP ClusterIP http " + both + tc.clusterIP,
				"203.0.113.1:80/TCP LoadBalancer http " + both + tc.balanced,
				"[2001:db8::1]:80/TCP LoadBalancer http " + both6 + tc.balanced6,
				"[fd00:96::1]:80/TCP ClusterIP http " + both6 + tc.clusterIP,
			})
		})
	}
	t.Run("a node that may come may do so from the load balancer's address", func(t *testing.T) {
		svc := web(dual, lb, ports("http:80"), sources("192.0.2.0/24", "2001:db8:1::/48"))
		for addr, want := range map[string][2]string{
			"192.0.2.9":     {"[192.0.2.0/24 203.0.113.1/32]", "[2001:db8:1::/48]"},
			"198.51.100.9":  {"[192.0.2.0/24]", "[2001:db8:1::/48]"},
			"2001:db8:1::9": {"[192.0.2.0/24]", "[2001:db8::1/128 2001:db8:1::/48]"},
		} {
			node := nodeA
			node.Addrs = []netip.Addr{netip.MustParseAddr("172.16.0.1"), netip.MustParseAddr(addr)}
			m := newModel(nodeA)
			m.SetService(svcfacts.Service(svc))
			for _, es := range two {
				m.SetSlice(svcfacts.Slice(es))
			}
			m.Changes()
			m.SetNode(node)
			if got := len(m.Changes()); got != map[bool]int{true: 1, false: 0}[addr != "198.51.100.9"] {
				t.Errorf("%s: %d changes when the node gets the address", addr, got)
			}
			for _, frontends := range [][]service.Frontend{service.Frontends(svcfacts.Service(svc), svcfacts.Slices(two), node), m.Frontends()} {
				sameLines(t, "frontends of a node at "+addr, lines(frontends), []string{
					"10.96.0.1:80/TCP ClusterIP http " + both,
					"203.0.113.1:80/TCP LoadBalancer http " + both + " from " + want[0],
					"[2001:db8::1]:80/TCP LoadBalancer http " + both6 + " from " + want[1],
					"[fd00:96::1]:80/TCP ClusterIP http " + both6,
				})
			}
		}
	})
	t.Run("sources are a load balancer's alone", func(t *testing.T) {
		svc := web(nodePort, externalIPs("203.0.113.2"), sources("192.0.2.0/24"))
		sameLines(t, "frontends", lines(service.Frontends(svcfacts.Service(svc), svcfacts.Slices(one), nodeA)), []string{
			"0.0.0.0:30080/TCP NodePort http " + both,
			"10.96.0.1:80/TCP ClusterIP http " + both,
			"203.0.113.2:80/TCP ExternalIP http " + both,
		})
	})
}
