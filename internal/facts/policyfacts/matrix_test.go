package policyfacts_test

import (
	"cmp"
	"fmt"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policyfacts"
)

func TestMatrix(t *testing.T) {
	w := shop()
	w.pod("ops/host", "192.168.0.2", nil).Spec.HostNetwork = true
	w.pod("ops/none", "", nil)
	w.pod("ops/six", "fd00::7", nil)
	w.policy(t, "shop/in", "podSelector: {matchLabels: {app: db}}\ningress: [{from: [{namespaceSelector: {}}], ports: [{port: 80}, {port: 81, endPort: 90}, {protocol: UDP}]}, {from: [{podSelector: {matchLabels: {app: job}}}]}]")
	w.policy(t, "ops/out", "podSelector: {matchLabels: {app: probe}}\npolicyTypes: [Egress]\negress: [{ports: [{port: 85, endPort: 100}]}]")
	got := map[string]string{}
	for _, p := range w.cluster().Matrix("shop") {
		got[p.From+" "+p.To] = p.Text
	}
	for pair, want := range map[string]string{"shop/web shop/db": "80-90/TCP, UDP", "shop/job shop/db": "all", "ops/probe shop/db": "85-90/TCP", "ops/probe shop/web": "85-100/TCP",
		"shop/db ops/probe": "all", "ops/web ops/probe": "", "shop/db shop/db": "", "ops/six shop/db": "", "ops/host shop/db": "", "ops/none shop/db": ""} {
		if got[pair] != want {
			t.Errorf("%s: %q, want %q", pair, got[pair], want)
		}
	}
	if len(got) != 3*2+2*3*2 { // of the three in shop among each other, and with two others both ways
		t.Errorf("%d pairs: %v", len(got), got)
	}
}

func TestCompare(t *testing.T) {
	now := shop()
	now.policy(t, "shop/in", "podSelector: {matchLabels: {app: db}}\ningress: [{ports: [{port: 80}]}]")
	then := shop()
	then.policy(t, "shop/in", "podSelector: {matchLabels: {app: db}}\ningress: [{ports: [{port: 80}]}, {from: [{podSelector: {}}]}]")
	then.policy(t, "shop/job", "podSelector: {matchLabels: {app: job}}\ningress: [{}]") // which lets all in
	then.clusterPolicy(t, "base", baseline("1", "subject: {namespaces: {matchLabels: {team: b}}}\ningress: [{action: Deny, from: [{namespaces: {matchLabels: {team: a}}}], protocols: [{udp: {destinationPort: {number: 53}}}]}]"))
	file := then.cluster()
	c := now.cluster()
	got := c.Compare(c.With(policyfacts.Cluster{Policies: file.Policies, ClusterPolicies: file.ClusterPolicies}))
	want := []policyfacts.Differs{{From: "shop/job", To: "shop/db", Now: "80/TCP", Then: "all"}, {From: "shop/web", To: "shop/db", Now: "80/TCP", Then: "all"}}
	for _, from := range []string{"shop/db", "shop/job", "shop/web"} {
		for _, to := range []string{"ops/probe", "ops/web"} {
			want = append(want, policyfacts.Differs{From: from, To: to, Now: "all", Then: "all but 53/UDP"})
		}
	}
	slices.SortFunc(want, func(a, b policyfacts.Differs) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To))
	})
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if again := c.Compare(c); len(again) > 0 || len(c.Policies) != 1 {
		t.Errorf("without a change: %v; %s", again, fmt.Sprint(c.Policies))
	}
}
