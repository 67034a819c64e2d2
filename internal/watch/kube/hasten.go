package kube

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// answers is the annotation of pods that HastenReady has found to answer.
const answers = `{"metadata":{"annotations":{"fathom.network/answers":"true"}}}`

// HastenReady has kubelet look at pods as soon as they are ready, until ctx ends. kubelet's readiness probe asks
// first a few milliseconds after the container has started, when nothing can be ready yet, and again a second
// later at the earliest. But it asks, too, whenever a pod that is not ready changes (UpdatePodStatus in
// pkg/kubelet/prober): so this asks the same question of its own, through the API server, and annotates a pod
// that says yes. What it cannot do is left to the probe's period.
func (c *Client) HastenReady(ctx context.Context, namespace, selector, port, path string) {
	var asking sync.WaitGroup
	defer asking.Wait()
	pods := c.CoreV1().Pods(namespace)
	asked := map[types.UID]bool{}
	_ = follow(ctx, pods.List, pods.Watch, metav1.ListOptions{LabelSelector: selector},
		func(l *corev1.PodList) []corev1.Pod { return l.Items },
		func(p *corev1.Pod) bool {
			if p.Status.Phase != corev1.PodRunning || PodReady(p) || asked[p.UID] {
				return false
			}
			asked[p.UID] = true
			name := p.Name
			asking.Go(func() {
				for ctx.Err() == nil {
					if _, err := pods.ProxyGet("http", name, port, path, nil).DoRaw(ctx); err == nil {
						_, _ = pods.Patch(ctx, name, types.MergePatchType, []byte(answers), metav1.PatchOptions{})
						return
					}
					select {
					case <-ctx.Done():
					case <-time.After(askAgain):
					}
				}
			})
			return false
		})
}
