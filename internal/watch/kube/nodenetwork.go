package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// NodeNetwork is what a node's network says of itself in the Node object.
type NodeNetwork struct {
	// Annotations are set; nil leaves those that the node has.
	Annotations map[string]string
	// Unavailable is the condition NetworkUnavailable, which clouds set on new nodes and which keeps pods away.
	Unavailable bool
	Reason      string // CamelCase
	Message     string
}

// PublishNetwork writes it into the node's status. Annotations of others and conditions of others stay.
func (c *Client) PublishNetwork(ctx context.Context, node string, n NodeNetwork) error {
	status := corev1.ConditionFalse
	if n.Unavailable {
		status = corev1.ConditionTrue
	}
	now := metav1.NewTime(time.Now())
	patch := map[string]any{
		"status": map[string]any{"conditions": []corev1.NodeCondition{{
			Type: corev1.NodeNetworkUnavailable, Status: status, Reason: n.Reason, Message: n.Message,
			LastHeartbeatTime: now, LastTransitionTime: now,
		}}},
	}
	if n.Annotations != nil { // null would delete those of others
		patch["metadata"] = map[string]any{"annotations": n.Annotations}
	}
	data, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	_, err = c.CoreV1().Nodes().Patch(ctx, node, types.StrategicMergePatchType, data, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("publish the network's state in node %s: %w", node, err)
	}
	return nil
}
