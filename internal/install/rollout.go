package install

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Wait returns when every node has a ready agent of the DaemonSet's current template, so that it carries pods. It reports
// changes to progress, which may be nil.
func Wait(ctx context.Context, client *kube.Client, progress func(ready, want int32)) error {
	var last appsv1.DaemonSetStatus
	var told int32
	agents := kube.Selection{Namespace: netconf.Namespace, Fields: "metadata.name=" + daemonSet}
	err := kube.Until(ctx, client, kube.DaemonSets, agents, func(d *appsv1.DaemonSet) bool {
		s := d.Status
		if s.ObservedGeneration < d.Generation { // the status is about an older version of the object
			return false
		}
		// Pods of the previous template may still be ready: they do not count.
		ready, want := min(s.NumberReady, s.UpdatedNumberScheduled), s.DesiredNumberScheduled
		if progress != nil && (ready != told || want != last.DesiredNumberScheduled) {
			progress(ready, want)
		}
		told, last = ready, s
		return want > 0 && ready == want
	})
	if err != nil {
		return fmt.Errorf("wait for DaemonSet %s/%s, of which %d of %d pods are ready and %d have the current template: %w",
			netconf.Namespace, daemonSet, last.NumberReady, last.DesiredNumberScheduled, last.UpdatedNumberScheduled, err)
	}
	return nil
}
