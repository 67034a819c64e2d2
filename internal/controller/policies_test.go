package controller_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// clusterPolicy returns a ClusterNetworkPolicy.
func (c cluster) clusterPolicy(name string) *cnp.ClusterNetworkPolicy {
	c.Helper()
	all, err := kube.List(c.Context(), c.client, kube.ClusterNetworkPolicies, kube.Selection{})
	c.must(err)
	i := slices.IndexFunc(all, func(p *cnp.ClusterNetworkPolicy) bool { return p.Name == name })
	if i < 0 {
		c.Fatalf("there is no ClusterNetworkPolicy %s", name)
	}
	return all[i]
}

// valid waits until a ClusterNetworkPolicy's condition says this of its present generation.
func (c cluster) valid(name string, want metav1.ConditionStatus, text string) {
	c.Helper()
	var p *cnp.ClusterNetworkPolicy
	c.await(func() bool {
		p = c.clusterPolicy(name)
		is := meta.FindStatusCondition(p.Status.Conditions, policyfacts.Valid)
		return is != nil && is.Status == want && is.ObservedGeneration == p.Generation && strings.Contains(is.Message, text)
	}, func() string {
		return fmt.Sprintf("ClusterNetworkPolicy %s of generation %d has %+v", name, p.Generation, p.Status.Conditions)
	})
}

// policyEvents are how many events there are about a policy.
func (c cluster) policyEvents(namespace, kind, name, text string) int {
	c.Helper()
	l, err := c.client.CoreV1().Events(namespace).List(c.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name + ",reason=" + policyfacts.PolicyProblem})
	c.must(err)
	return len(slices.DeleteFunc(l.Items, func(e corev1.Event) bool {
		return !strings.Contains(e.Message, text) || e.Type != corev1.EventTypeWarning
	}))
}

// TestPolicyConditions: of a policy of which part cannot be applied it is said, there, which part.
func TestPolicyConditions(t *testing.T) {
	c := start(t)
	set := func(name, spec string) {
		t.Helper()
		c.must(c.apply(fmt.Sprintf(`{apiVersion: policy.networking.k8s.io/v1beta1, kind: ClusterNetworkPolicy, metadata: {name: %s}, spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [%s]}}`, name, spec)))
	}
	const good, names = `{action: Deny, to: [{namespaces: {}}]}`, `{action: Accept, to: [{domainNames: [example.com]}]}`
	set("good", good)
	set("names", names)
	namespaced := func(name, annotations string) {
		t.Helper()
		c.must(c.apply(fmt.Sprintf(`{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: %s, namespace: default, annotations: {%s}}, spec: {podSelector: {}}}`, name, annotations)))
	}
	namespaced("plain", "")
	namespaced("odd", `fathom.network/audit: "true"`)
	stop := c.run("one")
	c.valid("good", metav1.ConditionTrue, "")
	c.valid("names", metav1.ConditionFalse, "spec.egress[0].to[0]")
	c.await(func() bool {
		return c.policyEvents("default", "ClusterNetworkPolicy", "names", "spec.egress[0].to[0]") == 1
	},
		func() string { return "there is no event of the policy with domainNames" })
	c.await(func() bool { return c.policyEvents("default", "NetworkPolicy", "odd", "which is a label") == 1 },
		func() string { return "there is no event of the policy with an annotation that means nothing" })

	// What another implementation says stays.
	_, err := c.client.CoreV1().RESTClient().Patch("application/merge-patch+json").AbsPath("/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies/good/status").
		Body([]byte(`{"status": {"conditions": [{"type": "example.com/Ready", "status": "True", "reason": "Yes", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"},
			{"type": "` + policyfacts.Valid + `", "status": "False", "reason": "No", "message": "somebody else's", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}`)).DoRaw(t.Context())
	c.must(err)
	c.valid("good", metav1.ConditionTrue, "")
	if other := meta.FindStatusCondition(c.clusterPolicy("good").Status.Conditions, "example.com/Ready"); other == nil || other.Reason != "Yes" {
		t.Errorf("another implementation's condition is %+v", other)
	}

	// It follows the policy, whichever controller leads.
	set("names", good)
	c.valid("names", metav1.ConditionTrue, "")
	set("good", names)
	c.valid("good", metav1.ConditionFalse, "spec.egress[0].to[0]")
	stop()
	set("good", good)
	c.run("two")
	c.valid("good", metav1.ConditionTrue, "")
	if n := c.policyEvents("default", "NetworkPolicy", "plain", ""); n != 0 {
		t.Errorf("%d events of a NetworkPolicy that can be applied", n)
	}
}
