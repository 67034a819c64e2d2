package policyfacts_test

import (
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// shop is what the tables begin with: two namespaces, and outside of the cluster whatever has an address.
//
//	shop/web 10.0.0.1 (http is 8080), shop/db 10.0.0.2 (http is 9090), shop/job 10.0.0.3
//	ops/web  10.0.1.1, ops/probe 10.0.1.2
func shop() *world {
	w := newWorld()
	w.namespace("shop", map[string]string{"kubernetes.io/metadata.name": "shop", "team": "a"})
	w.namespace("ops", map[string]string{"kubernetes.io/metadata.name": "ops", "team": "b"})
	http := func(n int32) corev1.ContainerPort { return corev1.ContainerPort{Name: "http", ContainerPort: n} }
	w.pod("shop/web", "10.0.0.1", map[string]string{"app": "web"}, http(8080))
	w.pod("shop/db", "10.0.0.2", map[string]string{"app": "db"}, http(9090), corev1.ContainerPort{Name: "dns", ContainerPort: 53, Protocol: corev1.ProtocolUDP})
	w.pod("shop/job", "10.0.0.3", map[string]string{"app": "job"})
	w.pod("ops/web", "10.0.1.1", map[string]string{"app": "web"})
	w.pod("ops/probe", "10.0.1.2", map[string]string{"app": "probe"})
	return w
}

// packet reads "shop/web > 10.9.9.9:80/UDP"; the protocol may be a number, whose port means nothing.
func (w *world) packet(t *testing.T, s string) policy.Packet {
	t.Helper()
	from, to, _ := strings.Cut(s, " > ")
	to, _, found := strings.Cut(to, "/TCP")
	p := policy.Packet{Protocol: service.TCP}
	if !found {
		if i := strings.LastIndex(to, "/"); i > strings.LastIndex(to, ":") {
			var proto string
			to, proto = to[:i], to[i+1:]
			switch proto {
			case "UDP":
				p.Protocol = service.UDP
			case "SCTP":
				p.Protocol = service.SCTP
			default:
				n, err := strconv.Atoi(proto)
				if err != nil {
					t.Fatal(err)
				}
				p.Protocol = service.Protocol(n)
			}
		}
	}
	i := strings.LastIndex(to, ":")
	port, err := strconv.Atoi(to[i+1:])
	if err != nil {
		t.Fatal(err)
	}
	p.Port = uint16(port)
	at := func(name string) string {
		if pod := w.pods[name]; pod != nil {
			return pod.Status.PodIP
		}
		return strings.Trim(name, "[]")
	}
	p.From, p.To = addr(at(from)), addr(at(to[:i]))
	return p
}

// TestFacts has what is easily got wrong of the API. A check is a connection and the rule that allows it, "-" if no policy has
// anything to say, or "no" with the direction.
func TestFacts(t *testing.T) {
	const denyIngress = "podSelector: {matchLabels: {app: db}}\npolicyTypes: [Ingress]"
	tests := []struct {
		name     string
		policies map[string]string
		change   func(*world)
		want     map[string]string
	}{
		{name: "no policy", want: map[string]string{"shop/web > shop/db:80": "-", "10.9.9.9 > shop/db:80": "-", "shop/db > 10.9.9.9:443/UDP": "-"}},
		{name: "an empty rule list denies, and only in its direction, and only to whom it selects",
			policies: map[string]string{"shop/deny": denyIngress},
			want: map[string]string{"shop/web > shop/db:80": "no ingress", "10.9.9.9 > shop/db:80": "no ingress", "shop/web > shop/db:0/1": "no ingress",
				"shop/db > shop/web:80": "-", "shop/db > 10.9.9.9:80": "-", "shop/web > shop/job:80": "-"}},
		{name: "policyTypes are Ingress, and Egress only where there are egress rules",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}", "shop/b": "podSelector: {matchLabels: {app: job}}\negress: [{}]"},
			want: map[string]string{"shop/db > shop/web:80": "-", "shop/web > shop/db:80": "no ingress",
				"shop/job > shop/web:80": "shop/b spec.egress[0]", "shop/web > shop/job:80": "no ingress"}},
		{name: "policyTypes: [Egress] alone does not isolate for ingress, whatever rules for it are there",
			policies: map[string]string{"shop/a": "podSelector: {}\npolicyTypes: [Egress]\ningress: [{ports: [{port: 1}]}]"},
			want:     map[string]string{"ops/web > shop/db:80": "-", "shop/db > ops/web:80": "no egress"}},
		{name: "both ends have to allow it",
			policies: map[string]string{"shop/in": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]",
				"shop/out": "podSelector: {matchLabels: {app: web}}\npolicyTypes: [Egress]\negress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]"},
			want: map[string]string{"shop/web > shop/db:80": "shop/out spec.egress[0].to[0], shop/in spec.ingress[0].from[0]",
				"shop/web > shop/job:80": "no egress", "shop/job > shop/db:80": "no ingress", "shop/job > shop/web:80": "-"}},
		{name: "policies are united",
			policies: map[string]string{"shop/deny": denyIngress, "shop/web": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 80}]}]",
				"shop/any": "podSelector: {}\ningress: [{ports: [{port: 443}]}]"},
			want: map[string]string{"shop/web > shop/db:80": "shop/web spec.ingress[0].from[0]", "shop/web > shop/db:443": "shop/any spec.ingress[0]",
				"10.9.9.9 > shop/db:443": "shop/any spec.ingress[0]", "shop/job > shop/db:80": "no ingress", "shop/web > shop/db:81": "no ingress"}},
		{name: "from: [] and no from are everyone; ingress: [{}] is everything",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [], ports: [{port: 80}]}]", "shop/b": "podSelector: {matchLabels: {app: job}}\ningress: [{}]"},
			want: map[string]string{"10.9.9.9 > shop/db:80": "shop/a spec.ingress[0]", "10.9.9.9 > shop/db:80/UDP": "no ingress",
				"10.9.9.9 > shop/job:80/SCTP": "shop/b spec.ingress[0]", "ops/web > shop/job:0/1": "shop/b spec.ingress[0]"}},
		{name: "podSelector alone is of the own namespace, and the zero selector is everything there",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {}}]}]"},
			want:     map[string]string{"shop/web > shop/db:80": "shop/a spec.ingress[0].from[0]", "ops/web > shop/db:80": "no ingress", "10.9.9.9 > shop/db:80": "no ingress"}},
		{name: "namespaceSelector: {} is all namespaces, and nobody outside",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{namespaceSelector: {}}]}]"},
			want:     map[string]string{"shop/web > shop/db:80": "shop/a spec.ingress[0].from[0]", "ops/web > shop/db:80": "shop/a spec.ingress[0].from[0]", "10.9.9.9 > shop/db:80": "no ingress"}},
		{name: "both selectors in one entry are both, in two they are either",
			policies: map[string]string{"shop/and": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: b}}, podSelector: {matchLabels: {app: web}}}]}]",
				"shop/or": "podSelector: {matchLabels: {app: job}}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}, {podSelector: {matchLabels: {app: web}}}]}]"},
			want: map[string]string{"ops/web > shop/db:80": "shop/and spec.ingress[0].from[0]", "ops/probe > shop/db:80": "no ingress", "shop/web > shop/db:80": "no ingress",
				"ops/web > shop/job:80": "shop/or spec.ingress[0].from[0]", "ops/probe > shop/job:80": "shop/or spec.ingress[0].from[0]",
				"shop/web > shop/job:80": "shop/or spec.ingress[0].from[1]", "shop/db > shop/job:80": "no ingress"}},
		{name: "matchExpressions: NotIn takes who has no such label",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [job]}, {key: old, operator: DoesNotExist}]}}]}]"},
			change:   func(w *world) { w.pods["shop/web"].Labels = nil },
			want:     map[string]string{"shop/web > shop/db:80": "shop/a spec.ingress[0].from[0]", "shop/job > shop/db:80": "no ingress"}},
		{name: "except is of its own entry alone",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{ipBlock: {cidr: 10.9.0.0/16, except: [10.9.9.0/24]}}]}]",
				"shop/b": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{ipBlock: {cidr: 10.9.9.9/32}}], ports: [{port: 80}]}]"},
			want: map[string]string{"10.9.1.1 > shop/db:80": "shop/a spec.ingress[0].from[0]", "10.9.9.8 > shop/db:80": "no ingress",
				"10.9.9.9 > shop/db:80": "shop/b spec.ingress[0].from[0]", "10.9.9.9 > shop/db:81": "no ingress", "10.10.0.0 > shop/db:80": "no ingress", "10.9.255.255 > shop/db:80": "shop/a spec.ingress[0].from[0]"}},
		{name: "ipBlock takes pods, too, and of egress what a Service's address became",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\npolicyTypes: [Egress]\negress: [{to: [{ipBlock: {cidr: 10.0.1.0/24, except: [10.0.1.2/32]}}]}]"},
			want:     map[string]string{"shop/db > ops/web:80": "shop/a spec.egress[0].to[0]", "shop/db > ops/probe:80": "no egress"}},
		{name: "0.0.0.0/0 is all of IPv4 and nothing of IPv6",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\npolicyTypes: [Egress]\negress: [{to: [{ipBlock: {cidr: 0.0.0.0/0}}]}]"},
			want: map[string]string{"shop/db > 255.255.255.255:80": "shop/a spec.egress[0].to[0]", "shop/db > 0.0.0.0:80": "shop/a spec.egress[0].to[0]",
				"shop/db > [::]:80": "no egress", "shop/db > [2001:db8::1]:80": "no egress", "shop/db > shop/web:80/UDP": "shop/a spec.egress[0].to[0]"}},
		{name: "a block of all IPv6 but one address", policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\npolicyTypes: [Egress]\negress: [{to: [{ipBlock: {cidr: '::/0', except: ['ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128', '::/128']}}]}]"},
			want: map[string]string{"shop/db > [::1]:80": "shop/a spec.egress[0].to[0]", "shop/db > [::]:80": "no egress", "shop/db > [ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:1": "no egress",
				"shop/db > [ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe]:1": "shop/a spec.egress[0].to[0]", "shop/db > 1.1.1.1:80": "no egress"}},
		{name: "a named port is each destination's own, of its protocol",
			policies: map[string]string{"shop/in": "podSelector: {}\ningress: [{ports: [{port: http}]}]",
				"ops/out": "podSelector: {matchLabels: {app: probe}}\npolicyTypes: [Egress]\negress: [{to: [{namespaceSelector: {}}], ports: [{port: http}]}]"},
			want: map[string]string{"ops/web > shop/web:8080": "shop/in spec.ingress[0]", "ops/web > shop/web:9090": "no ingress", "ops/web > shop/db:9090": "shop/in spec.ingress[0]",
				"ops/web > shop/db:9090/UDP": "no ingress", "ops/web > shop/job:8080": "no ingress",
				"ops/probe > shop/web:8080": "ops/out spec.egress[0].to[0], shop/in spec.ingress[0]", "ops/probe > shop/db:8080": "no egress", "ops/probe > ops/web:8080": "no egress"}},
		{name: "a named port with egress to anyone is the pods' that have one, and with ipBlock nobody's",
			policies: map[string]string{"ops/any": "podSelector: {matchLabels: {app: probe}}\npolicyTypes: [Egress]\negress: [{ports: [{port: http}]}]",
				"ops/block": "podSelector: {matchLabels: {app: web}}\npolicyTypes: [Egress]\negress: [{to: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: http}]}]"},
			want: map[string]string{"ops/probe > shop/db:9090": "ops/any spec.egress[0]", "ops/probe > shop/web:9090": "no egress", "ops/probe > 10.9.9.9:9090": "no egress", "ops/web > shop/db:9090": "no egress"}},
		{name: "a sidecar's named port counts, an init container's that ends does not",
			policies: map[string]string{"shop/in": "podSelector: {matchLabels: {app: job}}\ningress: [{ports: [{port: metrics}, {port: setup}]}]"},
			change: func(w *world) {
				always := corev1.ContainerRestartPolicyAlways
				w.pods["shop/job"].Spec.InitContainers = []corev1.Container{
					{RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "metrics", ContainerPort: 9000}}},
					{Ports: []corev1.ContainerPort{{Name: "setup", ContainerPort: 9001}}}}
			},
			want: map[string]string{"ops/web > shop/job:9000": "shop/in spec.ingress[0]", "ops/web > shop/job:9001": "no ingress"}},
		{name: "endPort is the last of a range",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{ports: [{port: 80, endPort: 90}, {port: 85, endPort: 65535, protocol: UDP}]}]"},
			want: map[string]string{"ops/web > shop/db:79": "no ingress", "ops/web > shop/db:80": "shop/a spec.ingress[0]", "ops/web > shop/db:90": "shop/a spec.ingress[0]",
				"ops/web > shop/db:91": "no ingress", "ops/web > shop/db:65535/UDP": "shop/a spec.ingress[0]", "ops/web > shop/db:84/UDP": "no ingress"}},
		{name: "a protocol without a port is all of its ports, and no other protocol",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{ports: [{protocol: SCTP}]}]"},
			want: map[string]string{"ops/web > shop/db:1/SCTP": "shop/a spec.ingress[0]", "ops/web > shop/db:65535/SCTP": "shop/a spec.ingress[0]",
				"ops/web > shop/db:80": "no ingress", "ops/web > shop/db:80/UDP": "no ingress", "ops/web > shop/db:0/1": "no ingress"}},
		{name: "a pod meets itself whatever a policy says",
			policies: map[string]string{"shop/a": "podSelector: {}\npolicyTypes: [Ingress, Egress]"},
			want:     map[string]string{"shop/db > shop/db:80": "-", "shop/db > shop/web:80": "no egress"}},
		{name: "a pod of the node's network is neither subject nor peer, and an address as others are",
			policies: map[string]string{"shop/a": "podSelector: {}\ningress: [{from: [{namespaceSelector: {}}]}, {from: [{ipBlock: {cidr: 192.168.0.0/16}}], ports: [{port: 80}]}]"},
			change: func(w *world) {
				w.pod("ops/host", "192.168.0.7", map[string]string{"app": "web"}).Spec.HostNetwork = true
				w.pod("shop/host", "192.168.0.8", nil).Spec.HostNetwork = true
			},
			want: map[string]string{"ops/host > shop/db:81": "no ingress", "ops/host > shop/db:80": "shop/a spec.ingress[1].from[0]", "10.9.9.9 > shop/host:80": "-"}},
		{name: "who has ended is nobody, and who is ending still somebody",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {}}]}]"},
			change: func(w *world) {
				w.pods["shop/web"].DeletionTimestamp = &w.pods["shop/web"].CreationTimestamp
				w.pods["shop/job"].Status.Phase = corev1.PodSucceeded
				w.pod("shop/job2", "10.0.0.4", nil).Status.Phase = corev1.PodFailed
			},
			want: map[string]string{"shop/web > shop/db:80": "shop/a spec.ingress[0].from[0]", "shop/job > shop/db:80": "no ingress", "shop/job2 > shop/db:80": "no ingress"}},
		{name: "an address that has been given to another pod is the later one's",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]"},
			change: func(w *world) {
				w.pod("ops/later", "10.0.0.1", nil).CreationTimestamp.Time = w.pods["shop/web"].CreationTimestamp.Add(1e9)
			},
			want: map[string]string{"10.0.0.1 > shop/db:80": "no ingress"}},
		{name: "what has two families has one identity",
			policies: map[string]string{"shop/a": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {matchLabels: {app: web}}}]}]"},
			change: func(w *world) {
				w.pods["shop/web"].Status.PodIPs = append(w.pods["shop/web"].Status.PodIPs, corev1.PodIP{IP: "fd00::1"})
				w.pods["shop/db"].Status.PodIPs = append(w.pods["shop/db"].Status.PodIPs, corev1.PodIP{IP: "fd00::2"})
			},
			want: map[string]string{"fd00::1 > [fd00::2]:80": "shop/a spec.ingress[0].from[0]", "fd00::3 > [fd00::2]:80": "no ingress"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := shop()
			for name, spec := range test.policies {
				w.policy(t, name, spec)
			}
			if test.change != nil {
				test.change(w)
			}
			m := w.model()
			f := m.Facts()
			for s, want := range test.want {
				if got := answer(f, w.packet(t, s)); got != want {
					t.Errorf("%s: %s, want %s", s, got, want)
				}
			}
			if p := m.Problems(); len(p) > 0 {
				t.Errorf("problems: %v", p)
			}
		})
	}
}

// TestOddPolicies: what nothing can be made of allows nothing, and is told. The API server refuses nearly all of it.
func TestOddPolicies(t *testing.T) {
	tests := []struct{ name, spec, problem string }{
		{"an empty peer", "podSelector: {}\ningress: [{from: [{}]}]", "spec.ingress[0].from[0] has none of"},
		{"a block and a selector", "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]", "spec.ingress[0].from[0] has a selector beside ipBlock"},
		{"no CIDR", "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: ten}}]}]", `spec.ingress[0].from[0] has a CIDR "ten"`},
		{"no CIDR to except", "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/33]}}]}]", `spec.ingress[0].from[0] has a CIDR "10.0.0.0/33"`},
		{"everything excepted", "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [0.0.0.0/0]}}]}]", ""},
		{"a protocol that is none", "podSelector: {}\ningress: [{ports: [{protocol: ICMP}]}]", `spec.ingress[0].ports[0] has a protocol "ICMP"`},
		{"a range backwards", "podSelector: {}\ningress: [{ports: [{port: 8080, endPort: 80}]}]", "spec.ingress[0].ports[0] has ports 8080 to 80"},
		{"a range of a name", "podSelector: {}\ningress: [{ports: [{port: http, endPort: 80}]}]", "spec.ingress[0].ports[0] has an endPort"},
		{"a range from nowhere", "podSelector: {}\ningress: [{ports: [{endPort: 80}]}]", "spec.ingress[0].ports[0] has an endPort without"},
		{"port 0", "podSelector: {}\ningress: [{ports: [{port: 0}]}]", "spec.ingress[0].ports[0] has ports 0 to 0"},
		{"an operator that is none", "podSelector: {}\ningress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Near}]}}]}]", "spec.ingress[0].from[0] .podSelector has an operator"},
		{"values that are none", "podSelector: {}\ningress: [{from: [{namespaceSelector: {matchExpressions: [{key: a, operator: NotIn}]}}]}]", "spec.ingress[0].from[0] .namespaceSelector has no values"},
		{"a subject that is none", "podSelector: {matchExpressions: [{key: a, operator: Near}]}", "spec.podSelector has an operator"},
		{"a name that no pod has", "podSelector: {}\ningress: [{ports: [{port: nobody}]}]", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := shop()
			w.policy(t, "shop/odd", test.spec)
			m := w.model()
			for _, s := range []string{"ops/web > shop/db:80", "10.9.9.9 > shop/db:8080", "shop/web > shop/db:0/1"} {
				if allowed, why := judge(m.Facts(), w.packet(t, s)); allowed {
					t.Errorf("%s is allowed by %q", s, why)
				}
			}
			got := strings.Join(m.Problems()[policyfacts.ID(service.Name{Namespace: "shop", Name: "odd"})], "\n")
			if !strings.HasPrefix(got, test.problem) || (got == "") != (test.problem == "") {
				t.Errorf("problems: %q, want %q", got, test.problem)
			}
		})
	}
}

// TestOldCIDRs: objects of before keep what new ones are refused.
func TestOldCIDRs(t *testing.T) {
	w := shop()
	w.policy(t, "shop/old", "podSelector: {}\ningress: [{from: [{ipBlock: {cidr: 010.9.0.1/16}}, {ipBlock: {cidr: '::ffff:11.0.0.0/104'}}]}]")
	f := w.model().Facts()
	for s, want := range map[string]bool{"10.9.0.0 > shop/db:80": true, "11.1.1.1 > shop/db:80": true, "12.0.0.0 > shop/db:80": false, "8.9.0.1 > shop/db:80": false} {
		if allowed, _ := judge(f, w.packet(t, s)); allowed != want {
			t.Errorf("%s: %v, want %v", s, allowed, want)
		}
	}
}
