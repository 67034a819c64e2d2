package kube

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// WaitDaemonSet returns when every pod of the DaemonSet is of its present template and ready. progress is told
// what changes, and may be nil.
func (c *Client) WaitDaemonSet(ctx context.Context, namespace, name string, progress func(ready, want int32)) error {
	var last appsv1.DaemonSetStatus
	options := metav1.ListOptions{FieldSelector: "metadata.name=" + name}
	err := follow(ctx, c.AppsV1().DaemonSets(namespace).List, c.AppsV1().DaemonSets(namespace).Watch, options,
		func(l *appsv1.DaemonSetList) []appsv1.DaemonSet { return l.Items },
		func(d *appsv1.DaemonSet) bool {
			s := d.Status
			if progress != nil && (s.NumberReady != last.NumberReady || s.DesiredNumberScheduled != last.DesiredNumberScheduled) {
				progress(s.NumberReady, s.DesiredNumberScheduled)
			}
			last = s
			// A controller that has not seen the object yet tells of the one before it.
			return s.ObservedGeneration >= d.Generation && s.DesiredNumberScheduled > 0 &&
				s.UpdatedNumberScheduled == s.DesiredNumberScheduled && s.NumberReady == s.DesiredNumberScheduled
		})
	if err != nil {
		return fmt.Errorf("wait for DaemonSet %s/%s, of which %d of %d pods are ready and %d of the present template: %w",
			namespace, name, last.NumberReady, last.DesiredNumberScheduled, last.UpdatedNumberScheduled, err)
	}
	return nil
}
