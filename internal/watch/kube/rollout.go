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
	var told int32
	options := metav1.ListOptions{FieldSelector: "metadata.name=" + name}
	err := follow(ctx, c.AppsV1().DaemonSets(namespace).List, c.AppsV1().DaemonSets(namespace).Watch, options,
		func(l *appsv1.DaemonSetList) []appsv1.DaemonSet { return l.Items },
		func(d *appsv1.DaemonSet) bool {
			s := d.Status
			if s.ObservedGeneration < d.Generation { // the controller tells of the object as it was before
				return false
			}
			// Of pods of the template before, which may be ready still, nobody wants to know.
			ready, want := min(s.NumberReady, s.UpdatedNumberScheduled), s.DesiredNumberScheduled
			if progress != nil && (ready != told || want != last.DesiredNumberScheduled) {
				progress(ready, want)
			}
			told, last = ready, s
			return want > 0 && ready == want
		})
	if err != nil {
		return fmt.Errorf("wait for DaemonSet %s/%s, of which %d of %d pods are ready and %d of the present template: %w",
			namespace, name, last.NumberReady, last.DesiredNumberScheduled, last.UpdatedNumberScheduled, err)
	}
	return nil
}
