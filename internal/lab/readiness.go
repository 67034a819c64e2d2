package lab

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

// since says from when on the state of each node counts: the API goes on telling what a node's kubelet said last, also of a
// node that has lost power since.
type since map[string]time.Time

// has says whether something of a node that was seen at t is its present state. The API tells whole seconds.
func (s since) has(node string, t time.Time) bool {
	return !t.Before(s[node].Truncate(time.Second))
}

// waitNodes returns when enough of the named nodes are Ready, and pods may be scheduled on them: the taint of a node that
// is not goes a moment after its kubelet has said that it is. (Its other taint, which evicts, takes seconds more, and all
// pods tolerate it for minutes.)
func waitNodes(ctx context.Context, client *kube.Client, names []string, enough int, since since) error {
	waiting := map[string]bool{}
	for _, n := range names {
		waiting[n] = true
	}
	err := kube.Until(ctx, client, kube.Nodes, kube.Selection{}, func(n *corev1.Node) bool {
		if slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool {
			return t.Key == corev1.TaintNodeNotReady && t.Effect == corev1.TaintEffectNoSchedule
		}) {
			return false
		}
		for _, cond := range n.Status.Conditions {
			if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue && since.has(n.Name, cond.LastHeartbeatTime.Time) {
				delete(waiting, n.Name)
			}
		}
		return len(names)-len(waiting) >= enough
	})
	if err != nil {
		return fmt.Errorf("wait for %d of %d nodes to become Ready (%d are not): %w", enough, len(names), len(waiting), err)
	}
	return nil
}

// waitPods returns when pods of the selector are ready on enough nodes.
func waitPods(ctx context.Context, client *kube.Client, namespace, selector string, nodes int, since since) error {
	ready := map[string]string{} // pod to node
	err := kube.Until(ctx, client, kube.Pods, kube.Selection{Namespace: namespace, Labels: selector}, func(p *corev1.Pod) bool {
		delete(ready, p.Name)
		if podReady(p) && started(p, since) {
			ready[p.Name] = p.Spec.NodeName
		}
		on := map[string]bool{}
		for _, node := range ready {
			on[node] = true
		}
		return len(on) >= nodes
	})
	if err != nil {
		return fmt.Errorf("wait for pods %s in %s to be ready on %d nodes: %w", selector, namespace, nodes, err)
	}
	return nil
}

// started says whether the pod's containers were started in its node's present life.
func started(p *corev1.Pod, since since) bool {
	for _, s := range p.Status.ContainerStatuses {
		if s.State.Running == nil || !since.has(p.Spec.NodeName, s.State.Running.StartedAt.Time) {
			return false
		}
	}
	return true
}

// podReady says whether the pod has the condition Ready.
func podReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

const (
	// answers is the patch of pods that hastenReady has found to answer.
	answers = `{"metadata":{"annotations":{"fathom.network/answers":"true"}}}`
	// askAgain is the time between two questions to a container that is starting, and has nothing to send events with.
	askAgain = 25 * time.Millisecond
)

// hastenReady has kubelet look at pods as soon as they are ready, until ctx ends. kubelet's readiness probe asks
// first a few milliseconds after the container has started, when nothing can be ready yet, and again a second
// later at the earliest. But it asks, too, whenever a pod that is not ready changes (UpdatePodStatus in
// pkg/kubelet/prober): so this asks the same question of its own, through the API server, and annotates a pod
// that says yes. What it cannot do is left to the probe's period.
func hastenReady(ctx context.Context, client *kube.Client, namespace, selector, port, path string) {
	var asking sync.WaitGroup
	defer asking.Wait()
	pods := client.CoreV1().Pods(namespace)
	asked := map[types.UID]bool{}
	_ = kube.Until(ctx, client, kube.Pods, kube.Selection{Namespace: namespace, Labels: selector}, func(p *corev1.Pod) bool {
		if p.Status.Phase != corev1.PodRunning || podReady(p) || asked[p.UID] {
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
