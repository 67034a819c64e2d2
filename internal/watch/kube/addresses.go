package kube

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// SetIngress writes the load balancer's addresses into the status of a Service as it was seen, and with them its
// finalizers, which the subresource takes, too: if it has changed since,
// the error is one that apierrors.IsConflict knows. A Service that is gone is not an error.
func (c *Client) SetIngress(ctx context.Context, s *corev1.Service, owner string, ingress []corev1.LoadBalancerIngress, finalizers []string) error {
	if ingress == nil {
		ingress = []corev1.LoadBalancerIngress{}
	}
	if finalizers == nil {
		finalizers = []string{}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": s.UID, "resourceVersion": s.ResourceVersion, "finalizers": finalizers},
		"status":   map[string]any{"loadBalancer": map[string]any{"ingress": ingress}},
	})
	if err != nil {
		return err
	}
	_, err = c.CoreV1().Services(s.Namespace).Patch(ctx, s.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: owner}, "status")
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write the status of Service %s/%s: %w", s.Namespace, s.Name, err)
	}
	return nil
}
