package service_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

func TestExplain(t *testing.T) {
	lb := web(loadBalancer("203.0.113.1"), externalLocal)
	for _, tc := range []struct {
		name   string
		svc    *corev1.Service
		slices endpointSlices
		want   []string
	}{
		{"all that there is to know", web(nodePort), endpointSlices{slice("s", "http:8080", "10.244.1.2 on=a in=east pod=web-1")},
			[]string{"s http TCP 10.244.1.2:8080 a east web-1 inside outside: "}},
		{"an address for inside alone", web(), endpointSlices{slice("s", "http:8080", "10.244.1.2")}, []string{"s http TCP 10.244.1.2:8080 inside: "}},
		{"conditions", web(), endpointSlices{slice("s", "http:8080", "10.244.1.1 unready", "10.244.1.2 unready terminating", "10.244.1.3 unready unserving terminating", "10.244.1.4")}, []string{
			"s http TCP 10.244.1.1:8080: it is not ready",
			"s http TCP 10.244.1.2:8080: it terminates, and others are ready",
			"s http TCP 10.244.1.3:8080: it terminates and serves no longer",
			"s http TCP 10.244.1.4:8080 inside: ",
		}},
		{"the last resort", web(), endpointSlices{slice("s", "http:8080", "10.244.1.2 unready terminating")},
			[]string{"s http TCP 10.244.1.2:8080 inside: it terminates, but serves, and none is ready"}},
		{"zones", web(), endpointSlices{slice("s", "http:8080", "10.244.1.2 zones=east", "10.244.2.2 zones=west,north")}, []string{
			"s http TCP 10.244.1.2:8080 inside: ",
			"s http TCP 10.244.2.2:8080: it is for clients in zone west,north, and zone east has others",
		}},
		{"nodes", web(), endpointSlices{slice("s", "http:8080", "10.244.1.2 nodes=a", "10.244.2.2 nodes=b")}, []string{
			"s http TCP 10.244.1.2:8080 inside: ",
			"s http TCP 10.244.2.2:8080: it is for clients on node b, and node a has others",
		}},
		{"externalTrafficPolicy: Local", lb, one, []string{
			"s http TCP 10.244.1.2:8080 a inside outside: ",
			"s http TCP 10.244.2.2:8080 b inside: it is on another node: only from inside, for externalTrafficPolicy is Local",
		}},
		{"internalTrafficPolicy: Local", web(internalLocal), one, []string{
			"s http TCP 10.244.1.2:8080 a inside: ",
			"s http TCP 10.244.2.2:8080 b: it is on another node, and internalTrafficPolicy is Local",
		}},
		{"ports", web(), endpointSlices{slice("s", "admin:81 http http:80/ICMP", "10.244.1.2")}, []string{
			"s admin TCP 10.244.1.2:81: the Service has no port named \"admin\" of TCP",
			"s http TCP invalid AddrPort: the slice's port \"http\" has no number",
			"s http protocol 0 invalid AddrPort: the slice's port \"http\" is none of TCP, UDP or SCTP",
		}},
		{"addresses", web(), endpointSlices{slice("s", "http:80", "127.0.0.1", "fd00::1")}, []string{
			"s http TCP invalid AddrPort: its address \"127.0.0.1\" is a loopback address",
			"s http TCP invalid AddrPort: its address \"fd00::1\" is not of the slice's family, IPv4",
		}},
		{"twice", web(), endpointSlices{slice("s", "http:80", "10.244.1.2 unready terminating"), slice("t", "http:80", "10.244.1.2")}, []string{
			"s http TCP 10.244.1.2:80: it is listed twice, and the other counts",
			"t http TCP 10.244.1.2:80 inside: ",
		}},
		{"headless", web(clusterIPs("None")), one, []string{
			"s http TCP 10.244.1.2:8080 a: the Service has no IPv4 address that is balanced here",
			"s http TCP 10.244.2.2:8080 b: the Service has no IPv4 address that is balanced here",
		}},
		{"the other family", web(), endpointSlices{slice6("s", "http:80", "fd00::1")},
			[]string{"s http TCP [fd00::1]:80: the Service has no IPv6 address that is balanced here"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, u := range svcfacts.Explain(tc.svc, tc.slices, nodeA) {
				s := fmt.Sprintf("%s %s %s %s", u.Slice, u.PortName, u.Protocol, u.Addr)
				for _, w := range []string{u.Node, u.Zone, u.Pod} {
					if w != "" {
						s += " " + w
					}
				}
				if u.Inside {
					s += " inside"
				}
				if u.Outside {
					s += " outside"
				}
				got = append(got, s+": "+u.Why)
			}
			sameLines(t, "endpoints", got, tc.want)
		})
	}
}
