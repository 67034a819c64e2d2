package policyfacts

import (
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
)

// Valid is the condition of a ClusterNetworkPolicy that says whether all of it can be applied. The API defines none, so that it has a name of its own:
// another implementation may write others.
const Valid = "fathom.network/Valid"

// Reasons of Valid, and of events about policies.
const (
	AllApplies    = "Valid"
	PolicyProblem = "PolicyProblem"
)

// Condition returns the condition that a ClusterNetworkPolicy should have by now, and whether that differs from the one it has.
func Condition(o *cnp.ClusterNetworkPolicy, p *policy.Policy, now time.Time) (c metav1.Condition, differs bool) {
	c = metav1.Condition{Type: Valid, Status: metav1.ConditionTrue, Reason: AllApplies, Message: "nodes with Fathom's agent apply all of it", ObservedGeneration: o.Generation,
		LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
	if len(p.Problems) > 0 {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, PolicyProblem, clip(strings.Join(p.Problems, "; "))
	}
	have := meta.FindStatusCondition(o.Status.Conditions, Valid)
	if have == nil {
		return c, true
	}
	if have.Status == c.Status {
		c.LastTransitionTime = have.LastTransitionTime
	}
	return c, have.Status != c.Status || have.Reason != c.Reason || have.Message != c.Message || have.ObservedGeneration != c.ObservedGeneration
}

// clip cuts a message to what the API takes in a condition.
func clip(message string) string {
	const longest, more = 32768, " ..."
	if len(message) <= longest {
		return message
	}
	return strings.ToValidUTF8(message[:longest-len(more)], "") + more
}
