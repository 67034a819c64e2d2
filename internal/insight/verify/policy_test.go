package verify

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

func TestParsePolicyQuery(t *testing.T) {
	pod := func(namespace, name string) PolicyEnd {
		return PolicyEnd{Pod: service.Name{Namespace: namespace, Name: name}}
	}
	addr := func(s string) PolicyEnd { return PolicyEnd{Addr: netip.MustParseAddr(s)} }
	for _, tc := range []struct {
		from, to string
		want     PolicyQuery
		err      string
	}{
		{from: "a", to: "b:80", want: PolicyQuery{pod("default", "a"), pod("default", "b"), service.TCP, 80}},
		{from: "x/a", to: "y/b:53/udp", want: PolicyQuery{pod("x", "a"), pod("y", "b"), service.UDP, 53}},
		{from: "x/a", to: "y/b", want: PolicyQuery{From: pod("x", "a"), To: pod("y", "b")}},
		{from: "10.0.0.1", to: "10.0.0.2:9/SCTP", want: PolicyQuery{addr("10.0.0.1"), addr("10.0.0.2"), service.SCTP, 9}},
		{from: "fd00::1", to: "[fd00::2]:80/TCP", want: PolicyQuery{addr("fd00::1"), addr("fd00::2"), service.TCP, 80}},
		{from: "fd00::1", to: "fd00::2", want: PolicyQuery{From: addr("fd00::1"), To: addr("fd00::2")}},
		{from: "a", to: "b:http", err: `port "http" is not a number`},
		{from: "a", to: "b:0", err: `port "0" is not a number`},
		{from: "a", to: "b:65536", err: "from 1 to 65535"},
		{from: "a", to: "b:80/ICMP", err: `protocol "ICMP" is none of`},
		{from: "", to: "b:80", err: "want a Pod"},
		{from: "x/y/z", to: "b:80", err: "want a Pod"},
		{from: "a", to: "x/:80", err: "want a Pod"},
	} {
		q, err := ParsePolicyQuery(tc.from, tc.to, "default")
		if tc.err != "" {
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%s to %s: %v, want %q", tc.from, tc.to, err, tc.err)
			}
			continue
		}
		if err != nil || q != tc.want {
			t.Errorf("%s to %s: %+v, %v, want %+v", tc.from, tc.to, q, err, tc.want)
		}
	}
}

func TestExplainPolicyEnds(t *testing.T) {
	pod := func(name string, phase corev1.PodPhase, ips ...string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name}, Status: corev1.PodStatus{Phase: phase}}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		return p
	}
	c := policyfacts.Cluster{Pods: []*corev1.Pod{pod("both", "Running", "10.0.0.1", "fd00::1"), pod("four", "Running", "10.0.0.2"), pod("six", "Running", "fd00::3"),
		pod("none", "Pending"), pod("over", "Succeeded", "10.0.0.9")}}
	for _, tc := range []struct {
		from, to string
		families int
		err      string
	}{
		{"x/both", "x/both:80", 2, ""}, {"x/both", "x/four:80", 1, ""}, {"192.0.2.1", "x/both:80", 1, ""},
		{"x/four", "x/six:80", 0, "no address family in common"}, {"x/four", "x/none:80", 0, "has no address: it is Pending"},
		{"x/over", "x/four:80", 0, "has no address: it is Succeeded"}, {"x/four", "x/nobody:80", 0, "there is no Pod x/nobody"},
	} {
		q, err := ParsePolicyQuery(tc.from, tc.to, "")
		if err != nil {
			t.Fatal(err)
		}
		all, err := ExplainPolicy(c, q)
		if len(all) != tc.families || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s to %s: %d families, %v", tc.from, tc.to, len(all), err)
		}
	}
}

func TestParsePolicies(t *testing.T) {
	const policy = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: deny}\nspec: {podSelector: {}}\n"
	const cluster = "apiVersion: policy.networking.k8s.io/v1beta1\nkind: ClusterNetworkPolicy\nmetadata: {name: deny}\n" +
		"spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [{action: Deny, to: [{networks: [10.0.0.0/8]}]}]}\n"
	c, err := ParsePolicies(strings.NewReader(policy+"---\n"+strings.Replace(policy, "{name: deny}", "{name: other, namespace: shop}", 1)+"---\n"+cluster), "x")
	if list := c.Policies; err != nil || len(list) != 2 || list[0].Namespace != "x" || list[1].Namespace != "shop" || len(c.ClusterPolicies) != 1 {
		t.Errorf("%v, %v", c, err)
	}
	for in, want := range map[string]string{
		"": "there is no policy",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: p}":                                          "Pod p of v1 is no NetworkPolicy",
		strings.Replace(policy, "networking.k8s.io", "crd.projectcalico.org", 1):                  "is no NetworkPolicy of networking.k8s.io",
		strings.Replace(policy, "podSelector: {}", "podSelector: {}, ingres: []", 1):              "ingres",
		strings.Replace(policy, "podSelector: {}", "podSelector: {}, ingress: [{from: [{}]}]", 1): "spec.ingress[0].from[0] has none of",
		strings.Replace(cluster, "10.0.0.0/8", "ten", 1):                                          "spec.egress[0].to[0] has a CIDR",
		strings.Replace(cluster, "tier", "tear", 1):                                               "tear",
		"kind: [": "yaml",
	} {
		if _, err := ParsePolicies(strings.NewReader(in), "x"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
}
