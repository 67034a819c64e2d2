package policyfacts_test

import (
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policyfacts"
)

// all is a subject of all pods; admin and baseline begin the spec of a policy of that tier.
const all = "subject: {namespaces: {}}\n"

func admin(priority, spec string) string {
	return "tier: Admin\npriority: " + priority + "\n" + spec
}

func baseline(priority, spec string) string {
	return "tier: Baseline\npriority: " + priority + "\n" + spec
}

// TestClusterFacts has what is easily got wrong of ClusterNetworkPolicy. A check is as in TestFacts, and "no" by a rule names it.
func TestClusterFacts(t *testing.T) {
	const db = "subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: db}}}}\n"
	tests := []struct {
		name     string
		policies map[string]string
		cluster  map[string]string
		change   func(*world)
		want     map[string]string
	}{
		{name: "a policy isolates nobody: what no rule is for is allowed, and a direction without rules is left alone",
			cluster: map[string]string{"a": admin("1", db+"ingress: [{action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}]}]")},
			want: map[string]string{"shop/web > shop/db:80": "no ingress a spec.ingress[0].from[0]", "ops/web > shop/db:80": "no ingress a spec.ingress[0].from[0]",
				"shop/job > shop/db:80": "-", "10.9.9.9 > shop/db:80": "-", "shop/db > shop/web:80": "-", "shop/web > shop/job:80": "-"}},
		{name: "Admin comes before NetworkPolicies, whichever way they decide",
			policies: map[string]string{"shop/allow": "podSelector: {matchLabels: {app: db}}\ningress: [{}]", "shop/deny": "podSelector: {matchLabels: {app: job}}"},
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Deny, from: [{namespaces: {matchLabels: {team: b}}}], protocols: [{tcp: {destinationPort: {number: 80}}}]},"+
				"{name: metrics, action: Accept, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 9090}}}]}]")},
			want: map[string]string{"ops/web > shop/db:80": "no ingress a spec.ingress[0].from[0]", "ops/web > shop/db:81": "shop/allow spec.ingress[0]",
				"ops/web > shop/job:9090": "a spec.ingress[1].from[0] (metrics)", "ops/web > shop/job:9091": "no ingress", "shop/web > shop/db:80": "shop/allow spec.ingress[0]"}},
		{name: "Baseline comes after NetworkPolicies, and only where none isolates the pod in the direction",
			policies: map[string]string{"shop/in": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{podSelector: {}}]}]"},
			cluster:  map[string]string{"b": baseline("1", all+"ingress: [{action: Deny, from: [{namespaces: {}}]}]\negress: [{action: Deny, to: [{networks: [10.9.0.0/16]}]}]")},
			want: map[string]string{"shop/web > shop/db:80": "shop/in spec.ingress[0].from[0]", "ops/web > shop/db:80": "no ingress", "shop/web > shop/job:80": "no ingress b spec.ingress[0].from[0]",
				"shop/db > 10.9.9.9:80": "no egress b spec.egress[0].to[0].networks[0]", "10.9.9.9 > shop/job:80": "-"}},
		{name: "no match in a NetworkPolicy is a denial, also where Baseline would accept",
			policies: map[string]string{"shop/in": "podSelector: {}"},
			cluster:  map[string]string{"b": baseline("1", all+"ingress: [{action: Accept, from: [{namespaces: {}}]}]")},
			want:     map[string]string{"ops/web > shop/db:80": "no ingress", "shop/db > ops/web:80": "b spec.ingress[0].from[0]"}},
		{name: "Pass in Admin skips what is left of the tier, and NetworkPolicies decide, or Baseline",
			policies: map[string]string{"shop/allow": "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{namespaceSelector: {matchLabels: {team: b}}}]}]"},
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: b}}}]}]"),
				"z": admin("2", all+"ingress: [{action: Deny, from: [{namespaces: {}}]}]"),
				"b": baseline("0", all+"ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{udp: {}}]}]")},
			want: map[string]string{"ops/web > shop/db:80": "shop/allow spec.ingress[0].from[0]", "shop/web > shop/db:80": "no ingress z spec.ingress[0].from[0]",
				"ops/web > shop/job:80": "-", "ops/web > shop/job:80/UDP": "no ingress b spec.ingress[0].from[0]"}},
		{name: "Pass in Baseline is what there is without policies",
			cluster: map[string]string{"b": baseline("1", all+"ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: b}}}]}, {action: Deny, from: [{namespaces: {}}]}]")},
			want:    map[string]string{"ops/web > shop/db:80": "-", "shop/web > shop/db:80": "no ingress b spec.ingress[1].from[0]"}},
		{name: "the lower priority is asked first, and rules in their order; at the same priority the name decides",
			cluster: map[string]string{"a": admin("20", all+"ingress: [{action: Deny, from: [{namespaces: {}}]}]"),
				"z": admin("10", all+"ingress: [{action: Accept, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}, {action: Deny, from: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {range: {start: 80, end: 81}}}}]}]"),
				"m": admin("20", all+"ingress: [{action: Accept, from: [{namespaces: {}}]}]")},
			want: map[string]string{"ops/web > shop/db:80": "z spec.ingress[0].from[0]", "ops/web > shop/db:81": "no ingress z spec.ingress[1].from[0]", "ops/web > shop/db:82": "no ingress a spec.ingress[0].from[0]"}},
		{name: "networks take pods as well, and what has no ports, of their family",
			cluster: map[string]string{"a": admin("1", db+"egress: [{action: Pass, to: [{namespaces: {matchLabels: {team: b}}}]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]")},
			want: map[string]string{"shop/db > shop/web:80": "no egress a spec.egress[1].to[0].networks[0]", "shop/db > shop/web:0/1": "no egress a spec.egress[1].to[0].networks[0]",
				"shop/db > 10.9.9.9:0/1": "no egress a spec.egress[1].to[0].networks[0]", "shop/db > ops/web:80": "-", "shop/db > [2001:db8::1]:80": "-"}},
		{name: "a rule for an address comes before one for the pod that has it, if it stands before",
			cluster: map[string]string{"a": admin("1", db+"egress: [{action: Accept, to: [{networks: [10.0.1.2/32]}]}, {action: Deny, to: [{namespaces: {}}]}, {action: Accept, to: [{networks: [10.0.0.0/8]}]}]")},
			want: map[string]string{"shop/db > ops/probe:80": "a spec.egress[0].to[0].networks[0]", "shop/db > ops/web:80": "no egress a spec.egress[1].to[0]",
				"shop/db > 10.9.9.9:80": "a spec.egress[2].to[0].networks[0]"}},
		{name: "the two addresses of a pod are each in their own networks",
			cluster: map[string]string{"a": admin("1", db+"egress: [{action: Deny, to: [{networks: [10.0.1.0/24]}]}]")},
			change: func(w *world) {
				for name, ip := range map[string]string{"ops/web": "fd00::7", "shop/db": "fd00::8"} {
					p := w.pods[name]
					p.Status.PodIPs = append(p.Status.PodIPs, p.Status.PodIPs[0])
					p.Status.PodIPs[1].IP = ip
				}
			},
			want: map[string]string{"shop/db > ops/web:80": "no egress a spec.egress[0].to[0].networks[0]", "fd00::8 > [fd00::7]:80": "-"}},
		{name: "nodes are the addresses of their status",
			cluster: map[string]string{"a": admin("1", db+"egress: [{action: Accept, to: [{nodes: {matchLabels: {role: edge}}}], protocols: [{tcp: {destinationPort: {number: 6443}}}]}, {action: Deny, to: [{nodes: {}}]}]")},
			change: func(w *world) {
				w.node("n1", map[string]string{"role": "edge"}, "192.168.0.1", "2001:db8::1")
				w.node("n2", nil, "192.168.0.2")
			},
			want: map[string]string{"shop/db > 192.168.0.1:6443": "a spec.egress[0].to[0]", "shop/db > [2001:db8::1]:6443": "a spec.egress[0].to[0]", "shop/db > 192.168.0.1:22": "no egress a spec.egress[1].to[0]",
				"shop/db > 192.168.0.2:6443": "no egress a spec.egress[1].to[0]", "shop/db > 192.168.0.3:22": "-"}},
		{name: "pods of the node's network are neither subject nor peer",
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Deny, from: [{namespaces: {}}]}]\negress: [{action: Deny, to: [{namespaces: {matchLabels: {team: b}}}]}]")},
			change: func(w *world) {
				w.pod("ops/host", "192.168.0.7", map[string]string{"app": "web"}).Spec.HostNetwork = true
			},
			want: map[string]string{"ops/host > shop/db:80": "-", "shop/db > ops/host:80": "-", "10.9.9.9 > ops/host:80": "-"}},
		{name: "a pod meets itself",
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Deny, from: [{namespaces: {}}]}]\negress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]")},
			want:    map[string]string{"shop/db > shop/db:80": "-", "shop/db > shop/web:80": "no egress a spec.egress[0].to[0].networks[0]"}},
		{name: "a named port is each destination's own, of whatever protocol",
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{destinationNamedPort: http}, {destinationNamedPort: dns}]}]"),
				"b": admin("0", "subject: {namespaces: {matchLabels: {team: b}}}\negress: [{action: Accept, to: [{namespaces: {}}], protocols: [{destinationNamedPort: http}]}]")},
			want: map[string]string{"shop/job > shop/web:8080": "no ingress a spec.ingress[0].from[0]", "shop/job > shop/web:9090": "-", "shop/job > shop/db:9090": "no ingress a spec.ingress[0].from[0]",
				"shop/job > shop/db:53/UDP": "no ingress a spec.ingress[0].from[0]", "shop/job > shop/db:53": "-", "ops/web > shop/db:9090": "no ingress a spec.ingress[0].from[0]"}},
		{name: "an Accept of egress says nothing of the destination's ingress",
			policies: map[string]string{"shop/deny": "podSelector: {}"},
			cluster:  map[string]string{"a": admin("1", all+"egress: [{action: Accept, to: [{networks: [0.0.0.0/0]}]}]")},
			want:     map[string]string{"ops/web > shop/db:80": "no ingress", "shop/db > ops/web:80": "a spec.egress[0].to[0].networks[0]"}},
		{name: "SCTP is not TCP",
			cluster: map[string]string{"a": admin("1", all+"ingress: [{action: Deny, from: [{namespaces: {}}], protocols: [{sctp: {destinationPort: {number: 80}}}]}]")},
			want:    map[string]string{"ops/web > shop/db:80/SCTP": "no ingress a spec.ingress[0].from[0]", "ops/web > shop/db:80": "-", "ops/web > shop/db:0/1": "-"}},
		{name: "who has ended is nobody, and who is ending still somebody",
			cluster: map[string]string{"a": admin("1", db+"ingress: [{action: Deny, from: [{namespaces: {}}]}]")},
			change: func(w *world) {
				w.pods["shop/web"].DeletionTimestamp = &w.pods["shop/web"].CreationTimestamp
				w.pods["shop/job"].Status.Phase = "Succeeded"
			},
			want: map[string]string{"shop/web > shop/db:80": "no ingress a spec.ingress[0].from[0]", "shop/job > shop/db:80": "-"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := shop()
			for name, spec := range test.policies {
				w.policy(t, name, spec)
			}
			for name, spec := range test.cluster {
				w.clusterPolicy(t, name, spec)
			}
			if test.change != nil {
				test.change(w)
			}
			m := w.model()
			for s, want := range test.want {
				if got := answer(m.Facts(), w.packet(t, s)); got != want {
					t.Errorf("%s: %s, want %s", s, got, want)
				}
			}
			if p := m.Problems(); len(p) > 0 {
				t.Errorf("problems: %v", p)
			}
		})
	}
}

// TestOddClusterPolicies: a rule of which something cannot be read fails closed, as the API has it, and is told.
func TestOddClusterPolicies(t *testing.T) {
	const (
		accept = "egress: [{action: Accept, to: [{networks: [10.9.9.9/32]}, ODD]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]"
		deny   = "egress: [{action: Deny, to: [{networks: [10.9.9.8/32]}, ODD]}]"
		pass   = "egress: [{action: Pass, to: [{networks: [10.9.9.8/32]}, ODD]}]"
	)
	odd := map[string]string{
		"a peer of a newer API":             "{}",
		"two kinds of peers":                "{namespaces: {}, nodes: {}}",
		"a network that is none":            "{networks: [10.0.0.0/33]}",
		"an operator that is none":          "{namespaces: {matchExpressions: [{key: a, operator: Near}]}}",
		"a selector of pods without values": "{pods: {namespaceSelector: {}, podSelector: {matchExpressions: [{key: a, operator: In}]}}}",
		"a selector of nodes":               "{nodes: {matchExpressions: [{key: a, operator: Near}]}}",
	}
	for name, peer := range odd {
		for action, spec := range map[string]string{"Accept": accept, "Deny": deny, "Pass": pass} {
			t.Run(name+", "+action, func(t *testing.T) {
				w := shop()
				w.clusterPolicy(t, "odd", admin("1", all+strings.ReplaceAll(spec, "ODD", peer)))
				m := w.model()
				for _, s := range []string{"shop/db > 10.9.9.9:80", "shop/db > ops/web:80/UDP", "shop/db > 10.9.9.9:0/1"} {
					if got := answer(m.Facts(), w.packet(t, s)); !strings.HasPrefix(got, "no egress odd spec.egress[") {
						t.Errorf("%s: %s", s, got)
					}
				}
				if got := m.Problems()[policyfacts.ClusterID("odd")]; len(got) != 1 || !strings.HasPrefix(got[0], "spec.egress[0].to[1] has ") {
					t.Errorf("problems: %v", got)
				}
			})
		}
	}
	for _, test := range []struct{ name, spec, problem, allowed, denied string }{
		{"a protocol of a newer API", all + "egress: [{action: Deny, to: [{networks: [10.9.9.8/32]}], protocols: [{}]}]", "spec.egress[0].protocols[0] has not one of", "", "shop/db > 10.9.9.9:80"},
		{"ports backwards", all + "egress: [{action: Deny, to: [{networks: [10.9.9.8/32]}], protocols: [{tcp: {destinationPort: {range: {start: 9, end: 8}}}}]}]", "spec.egress[0].protocols[0] has ports 9 to 8", "", "shop/db > 10.9.9.9:80"},
		{"an action of a newer API", all + "egress: [{action: Audit, to: [{networks: [10.9.9.8/32]}]}]", "spec.egress[0] has an action \"Audit\"", "", "shop/db > 10.9.9.9:80"},
		{"a rule for nobody", all + "egress: [{action: Deny}]", "spec.egress[0].to names nobody", "", "shop/db > 10.9.9.9:80"},
		{"a name of a port with a network", all + "egress: [{action: Deny, to: [{networks: [10.9.9.8/32]}], protocols: [{destinationNamedPort: http}]}]", "spec.egress[0].to[0] has no ports with names", "", "shop/db > 10.9.9.9:80"},
		{"domain names to deny", all + "egress: [{action: Deny, to: [{domainNames: [example.com]}]}]", "spec.egress[0].to[0] has domainNames, which only an Accept may have", "", "shop/db > 10.9.9.9:80"},
		{"domain names accept nothing, and what else the rule says", all + "egress: [{action: Accept, to: [{domainNames: [example.com]}, {networks: [10.9.9.9/32]}]}, {action: Deny, to: [{networks: [0.0.0.0/0]}]}]",
			"spec.egress[0].to[0] has domainNames", "shop/db > 10.9.9.9:80", "shop/db > 10.9.9.8:80"},
		{"a subject of a newer API accepts nothing", "subject: {}\negress: [{action: Accept, to: [{networks: [10.9.9.9/32]}]}, {action: Pass, to: [{networks: [10.9.9.9/32]}]}]",
			"spec.subject has not one of", "shop/db > 10.9.9.8:80", "shop/db > 10.9.9.9:80"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := shop()
			w.clusterPolicy(t, "odd", admin("1", test.spec))
			m := w.model()
			if got := answer(m.Facts(), w.packet(t, test.denied)); !strings.HasPrefix(got, "no egress odd") {
				t.Errorf("%s: %s", test.denied, got)
			}
			if test.allowed != "" {
				if got := answer(m.Facts(), w.packet(t, test.allowed)); strings.HasPrefix(got, "no ") {
					t.Errorf("%s: %s", test.allowed, got)
				}
			}
			if got := m.Problems()[policyfacts.ClusterID("odd")]; len(got) != 1 || !strings.HasPrefix(got[0], test.problem) {
				t.Errorf("problems: %v", got)
			}
		})
	}
}
