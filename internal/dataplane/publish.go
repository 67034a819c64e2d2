package dataplane

import (
	"context"
	"maps"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/kube"
	"github.com/fathom-network/fathom/internal/netfacts"
	"github.com/fathom-network/fathom/internal/nodestate"
)

// published is what was last written into the Node.
type published struct {
	ready       bool
	reason      string
	annotations map[string]string
	// unavailable is the condition as the API has it, in case somebody else sets it: a cloud's route controller,
	// or the API server of a restored backup.
	unavailable corev1.ConditionStatus
}

// publish tells the cluster what the node's network is like, when that has changed.
func (a *Agent) publish(ctx context.Context, s nodestate.Status) {
	if s.Plan.Node == "" {
		return // there is no Node to write to, or it was never seen
	}
	now := published{ready: s.Ready, reason: s.Reason, annotations: netfacts.Announcement(s.Plan), unavailable: a.condition()}
	want := corev1.ConditionFalse
	if !s.Ready {
		want = corev1.ConditionTrue
	}
	same := now.ready == a.told.ready && now.reason == a.told.reason && maps.Equal(now.annotations, a.told.annotations)
	if same && now.unavailable == want {
		return
	}
	n := kube.NodeNetwork{Annotations: now.annotations, Unavailable: !s.Ready, Reason: "FathomIsUp", Message: "pods' packets are routed"}
	if !s.Ready {
		n.Reason, n.Message = "FathomIsNotReady", s.Reason
	}
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	if err := a.Client.PublishNetwork(ctx, s.Plan.Node, n); err != nil {
		a.Log.Warn("the node's state was not published", "error", err) // the next pass tries again
		return
	}
	if s.Ready && !a.told.ready {
		a.event(ctx, false, "NetworkReady", "mode "+string(s.Plan.Mode)+": the node carries pods")
	}
	a.told = now
}

// condition returns the condition NetworkUnavailable of the node as the API has it.
func (a *Agent) condition() corev1.ConditionStatus {
	for _, n := range a.view.Nodes() {
		if n.Name != a.Node {
			continue
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeNetworkUnavailable {
				return c.Status
			}
		}
	}
	return ""
}
