package policyfacts_test

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/policyfacts"
)

func (w *world) cluster() (c policyfacts.Cluster) {
	for i, name := range []string{"node1", "node2"} {
		c.Nodes = append(c.Nodes, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.0.%d.0/24", 10*i)}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("192.168.0.%d", i+1)}}}})
	}
	for _, n := range w.namespaces {
		c.Namespaces = append(c.Namespaces, n)
	}
	for _, p := range w.pods {
		c.Pods = append(c.Pods, p)
	}
	for _, p := range w.policies {
		c.Policies = append(c.Policies, p)
	}
	for _, p := range w.clusterwide {
		c.ClusterPolicies = append(c.ClusterPolicies, p)
	}
	return c
}

func TestExplainTiers(t *testing.T) {
	w := shop()
	w.policy(t, "shop/in", "podSelector: {matchLabels: {app: db}}\ningress: [{ports: [{port: 80}]}]")
	w.clusterPolicy(t, "a", admin("1", all+"ingress: [{action: Pass, from: [{namespaces: {matchLabels: {team: b}}}]}, {name: own, action: Deny, from: [{namespaces: {}}]}]\n"+
		"egress: [{action: Deny, to: [{nodes: {}}], protocols: [{tcp: {destinationPort: {number: 10250}}}]}]"))
	c := w.cluster()
	m := c.Model()
	for _, tc := range []struct{ packet, want string }{
		{"ops/web > shop/db:80", "allowed; egress allowed; ingress allowed by NetworkPolicy shop/in spec.ingress[0], passed by ClusterNetworkPolicy a spec.ingress[0].from[0]"},
		{"ops/web > shop/db:81", "denied; egress allowed; ingress denied, passed by ClusterNetworkPolicy a spec.ingress[0].from[0], 1 rules do not"},
		{"shop/web > shop/db:80", "denied; egress allowed; ingress denied by ClusterNetworkPolicy a spec.ingress[1].from[0] (own)"},
		{"ops/web > shop/web:80", "allowed; egress allowed; ingress allowed, passed by ClusterNetworkPolicy a spec.ingress[0].from[0]"},
		{"shop/db > 192.168.0.1:10250", "denied; egress denied by ClusterNetworkPolicy a spec.egress[0].to[0]"}, // its own node
		{"shop/db > 192.168.0.2:10250", "denied; egress denied by ClusterNetworkPolicy a spec.egress[0].to[0]"},
		{"shop/db > 192.168.0.1:53", "allowed, a node and its own pods always reach each other"},
		{"192.168.0.1 > shop/db:10250", "allowed, a node and its own pods always reach each other"},
	} {
		e := c.Explain(m, w.packet(t, tc.packet))
		verdict := map[bool]string{true: "allowed", false: "denied"}
		got := verdict[e.Allowed]
		if e.Always != "" {
			got += ", " + e.Always
		}
		for _, s := range e.Sides {
			got += fmt.Sprintf("; %s %s", s.Direction, verdict[s.Allowed])
			if s.By != "" {
				got += " by " + s.By
			}
			if s.Passed != "" {
				got += ", passed by " + s.Passed
			}
			if len(s.Not) > 0 {
				got += fmt.Sprintf(", %d rules do not", len(s.Not))
			}
		}
		if got != tc.want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.packet, got, tc.want)
		}
	}
}

func TestExplain(t *testing.T) {
	w := shop()
	w.pods["shop/db"].Spec.NodeName = "node2"
	w.pod("ops/host", "192.168.0.2", nil).Spec.HostNetwork = true
	w.pods["ops/host"].Spec.NodeName = "node2"
	w.policy(t, "shop/db", `
podSelector: {matchLabels: {app: db}}
policyTypes: [Ingress, Egress]
ingress:
- from: [{podSelector: {matchLabels: {app: web}}}, {ipBlock: {cidr: 10.9.0.0/16, except: [10.9.9.0/24]}}]
  ports: [{port: 80}]
- ports: [{port: http}]
egress:
- to: [{ipBlock: {cidr: 10.0.0.0/16}}]
  ports: [{port: http}]`)
	w.policy(t, "shop/deny", "podSelector: {matchExpressions: [{key: app, operator: In, values: [db, job]}]}")
	c := w.cluster()
	m := c.Model()
	const db, not = "isolated by NetworkPolicy shop/db NetworkPolicy shop/deny", "NetworkPolicy shop/db spec."
	for _, tc := range []struct{ packet, want string }{
		{"shop/web > shop/db:80", "Pod shop/web > Pod shop/db allowed; egress of Pod shop/web free; ingress of Pod shop/db " + db + " by NetworkPolicy shop/db spec.ingress[0].from[0]"},
		{"ops/web > shop/db:9090", "Pod ops/web > Pod shop/db allowed; egress of Pod ops/web free; ingress of Pod shop/db " + db + " by NetworkPolicy shop/db spec.ingress[1]"},
		{"ops/web > shop/db:80", "Pod ops/web > Pod shop/db denied; egress of Pod ops/web free; ingress of Pod shop/db " + db + ", " + not + "ingress[0] is not for this client, " + not + "ingress[1] is not for this port"},
		{"10.9.9.9 > shop/db:81", " > Pod shop/db denied; ingress of Pod shop/db " + db + ", " + not + "ingress[0] is not for this client, nor for this port, " + not + "ingress[1] is not for this port"},
		{"10.9.1.1 > shop/db:81", " > Pod shop/db denied; ingress of Pod shop/db " + db + ", " + not + "ingress[0] is not for this port, " + not + "ingress[1] is not for this port"},
		{"shop/db > shop/web:8080", "Pod shop/db > Pod shop/web denied; egress of Pod shop/db isolated by NetworkPolicy shop/db, " + not + "egress[0] names the port, which means nothing for an ipBlock; ingress of Pod shop/web free"},
		{"shop/web > shop/job:80", "Pod shop/web > Pod shop/job denied; egress of Pod shop/web free; ingress of Pod shop/job isolated by NetworkPolicy shop/deny"},
		{"shop/db > shop/db:1", "Pod shop/db > Pod shop/db allowed, a pod always reaches itself"},
		{"ops/host > shop/db:1", "Node node2 > Pod shop/db allowed, a node and its own pods always reach each other"},
		{"shop/db > 10.0.10.1:1", "Pod shop/db > Node node2 allowed, a node and its own pods always reach each other"},
		{"192.168.0.1 > shop/db:1", "Node node1 > Pod shop/db denied; ingress of Pod shop/db " + db + ", " + not + "ingress[0] is not for this client, nor for this port, " + not + "ingress[1] is not for this port"},
		{"192.168.0.1 > 1.1.1.1:1", "Node node1 >  allowed"},
	} {
		e := c.Explain(m, w.packet(t, tc.packet))
		got := fmt.Sprintf("%s > %s %s", e.From, e.To, map[bool]string{true: "allowed", false: "denied"}[e.Allowed])
		if e.Always != "" {
			got += ", " + e.Always
		}
		for _, s := range e.Sides {
			got += fmt.Sprintf("; %s of %s ", s.Direction, s.Pod)
			if !s.Isolated {
				got += "free"
				continue
			}
			got += "isolated by " + strings.Join(s.Policies, " ")
			if s.Allowed {
				got += " by " + s.By
			}
			for _, r := range s.Not {
				got += ", " + r.Rule + " " + r.Why
			}
		}
		if got != tc.want {
			t.Errorf("%s:\n%s\nwant\n%s", tc.packet, got, tc.want)
		}
	}
}
