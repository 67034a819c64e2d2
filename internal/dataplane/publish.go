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

// publish tells the cluster what the node's network is like, when that has changed. A pass that failed before there was
// a plan is told as well: the condition would go on saying that pods are routed.
func (a *Agent) publish(ctx context.Context, s nodestate.Status) {
	node, found := a.view.Node(a.Node)
	if s.Waiting || !found {
		return // nothing is known yet, or there is no Node to write to
	}
	now := published{ready: s.Ready, reason: s.Reason, annotations: a.told.annotations, unavailable: condition(node)}
	if s.Plan.Node != "" {
		now.annotations = netfacts.Announcement(s.Plan)
	}
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
	if err := a.Client.PublishNetwork(ctx, a.Node, n); err != nil {
		a.Log.Warn("the node's state was not published", "error", err) // the next pass tries again
		return
	}
	if s.Ready && !a.told.ready {
		a.event(ctx, false, "NetworkReady", "mode "+string(s.Plan.Mode)+": the node carries pods")
	}
	a.told = now
}

// condition returns the node's condition NetworkUnavailable; empty if it has none.
func condition(n *corev1.Node) corev1.ConditionStatus {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeNetworkUnavailable {
			return c.Status
		}
	}
	return ""
}
