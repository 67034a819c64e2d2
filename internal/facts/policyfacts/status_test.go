package policyfacts_test

import (
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
)

func TestCondition(t *testing.T) {
	now := time.Date(2026, 12, 1, 12, 0, 0, 7, time.UTC)
	o := &cnp.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "names", Generation: 3}, Spec: cnp.ClusterNetworkPolicySpec{Tier: cnp.AdminTier,
		Subject: cnp.Subject{Namespaces: &metav1.LabelSelector{}}}}
	condition := func() (metav1.Condition, bool) {
		return policyfacts.Condition(o, policyfacts.ClusterNetworkPolicy(o), now)
	}
	c, differs := condition()
	if c.Type != policyfacts.Valid || c.Status != metav1.ConditionTrue || c.Reason != policyfacts.AllApplies || c.ObservedGeneration != 3 || !c.LastTransitionTime.Time.Equal(now.Truncate(time.Second)) || !differs {
		t.Errorf("a policy of which all applies has %+v, which differs: %v", c, differs)
	}
	foreign := metav1.Condition{Type: "Ready", Status: metav1.ConditionFalse}
	o.Status.Conditions = []metav1.Condition{foreign, c}
	if _, differs := condition(); differs {
		t.Error("what was just written differs")
	}
	began := c.LastTransitionTime
	now = now.Add(time.Hour)
	o.Generation = 4
	if c, differs = condition(); !differs || c.ObservedGeneration != 4 || !c.LastTransitionTime.Equal(&began) {
		t.Errorf("of another generation it is %+v, which differs: %v", c, differs)
	}
	o.Spec.Egress = []cnp.EgressRule{{Action: cnp.Accept, To: []cnp.EgressPeer{{DomainNames: []string{"example.com"}}, {Networks: []string{"nonsense"}}}}}
	c, differs = condition()
	if !differs || c.Status != metav1.ConditionFalse || c.Reason != policyfacts.PolicyProblem || !c.LastTransitionTime.Time.Equal(now.Truncate(time.Second)) {
		t.Errorf("with parts that cannot be applied it is %+v, which differs: %v", c, differs)
	}
	for _, part := range []string{"spec.egress[0].to[0]", "spec.egress[0].to[1]"} {
		if !strings.Contains(c.Message, part) {
			t.Errorf("the message %q says nothing of %s", c.Message, part)
		}
	}
	o.Spec.Egress[0].To = nil
	for range 600 {
		o.Spec.Egress[0].To = append(o.Spec.Egress[0].To, cnp.EgressPeer{Networks: []string{strings.Repeat("long", 20)}})
	}
	if c, _ = condition(); len(c.Message) > 32768 || !strings.HasSuffix(c.Message, " ...") {
		t.Errorf("a message of %d bytes, which the API does not take", len(c.Message))
	}
}
