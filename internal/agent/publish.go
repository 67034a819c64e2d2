package agent

import (
	"context"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// published is the state of the Node last handed to the publisher.
type published struct {
	ready       bool
	reason      string
	annotations map[string]string
}

// nodeWrite is the Node among the publisher's objects.
const nodeWrite = "node"

// publish hands the state of the node's network to the publisher when it has changed. It runs after the kernel was changed, so
// whatever the API says of this node, its kernel held at that time. A state that is not written yet is replaced by the next one.
// A pass that failed before there was a plan is published as well: the condition would otherwise go on saying that pods are
// routed.
func (a *Agent) publish(s answer.Status) {
	node, found := a.view.Node(a.Node)
	if s.Waiting || !found {
		return // nothing is known yet, or there is no Node
	}
	now := published{ready: s.Ready, reason: s.Reason, annotations: a.told.annotations}
	if s.Plan.Node != "" {
		now.annotations = netfacts.Announcement(s.Plan)
	}
	want := corev1.ConditionFalse
	if !s.Ready {
		want = corev1.ConditionTrue
	}
	same := now.ready == a.told.ready && now.reason == a.told.reason && maps.Equal(now.annotations, a.told.annotations)
	// Others may set the condition as well: a cloud's route controller, or a restored backup of etcd.
	if same && condition(node) == want {
		return
	}
	n := kube.NodeNetwork{Annotations: now.annotations, Unavailable: !s.Ready, Reason: "FathomIsUp", Message: "pods' packets are routed"}
	if !s.Ready {
		n.Reason, n.Message = "FathomIsNotReady", s.Reason
	}
	if s.Ready && !a.told.ready {
		a.untold.Store(true)
	}
	a.told = now
	a.writes.Publish(nodeWrite, func(ctx context.Context) error {
		switch err := a.Client.PublishNetwork(ctx, a.Node, n); {
		case apierrors.IsNotFound(err): // one that is made anew has no condition
			return nil
		case err != nil:
			return err
		}
		if s.Ready && a.untold.Swap(false) {
			a.event(false, "NetworkReady", "mode "+string(s.Plan.Mode)+": the node carries pods")
		}
		return nil
	})
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
