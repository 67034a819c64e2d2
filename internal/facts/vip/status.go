package vip

import (
	"math"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// Object is what the pool was read of.
func (p *Pool) Object() *v1alpha1.AddressPool { return p.object }

// Status is what a pool's status should be, and whether it is something else.
func (p *Pool) Status(assignments []Assignment, now time.Time) (status v1alpha1.AddressPoolStatus, differs bool) {
	used := map[string]bool{}
	assigned := map[corev1.IPFamily]int64{}
	for _, a := range assignments {
		for i, addr := range a.Addresses {
			if a.Pools[i] != p.Name {
				continue
			}
			if !used[addr.String()] { // those who share
				assigned[familyOf(addr)]++
			}
			used[addr.String()] = true
		}
		if slices.Contains(a.Pools, p.Name) {
			status.Services++
		}
	}
	for _, f := range []struct {
		family corev1.IPFamily
		into   **v1alpha1.AddressPoolUsage
	}{{corev1.IPv4Protocol, &status.IPv4}, {corev1.IPv6Protocol, &status.IPv6}} {
		if !p.hasFamily(f.family) {
			continue
		}
		u := &v1alpha1.AddressPoolUsage{Assigned: assigned[f.family]}
		for _, r := range p.Ranges {
			if familyOf(r.First) != f.family {
				continue
			}
			if n := r.size(); n > math.MaxInt64-u.Addresses {
				u.Addresses = math.MaxInt64
			} else {
				u.Addresses += n
			}
		}
		*f.into = u
	}
	condition := metav1.Condition{Type: v1alpha1.PoolValid, Status: metav1.ConditionTrue, Reason: "Valid", Message: "Services get addresses of the pool",
		ObservedGeneration: p.object.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second))}
	if p.Problem != nil {
		condition.Status, condition.Reason = metav1.ConditionFalse, p.Problem.Reason
		condition.Message = p.Problem.String() + "; Services keep what they have, and get no more"
	}
	if have := meta.FindStatusCondition(p.object.Status.Conditions, v1alpha1.PoolValid); have != nil && have.Status == condition.Status {
		condition.LastTransitionTime = have.LastTransitionTime
	}
	status.Conditions = []metav1.Condition{condition}
	return status, !equality.Semantic.DeepEqual(status, p.object.Status)
}
