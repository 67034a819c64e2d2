package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

// kube-proxy as kubeadm installs it.
const (
	kubeProxy          = "kube-proxy"
	kubeProxyNamespace = "kube-system"
	kubeProxySelector  = "k8s-app=kube-proxy"
	kubeProxyCleanup   = "--cleanup"
)

// ErrNoKubeProxy says that a cluster has no kube-proxy of the kind that can be removed: kubeadm's DaemonSet.
var ErrNoKubeProxy = errors.New("there is no DaemonSet kube-system/kube-proxy")

// RemoveKubeProxy removes kube-proxy from a cluster whose Services the agents already carry. Each node's kube-proxy removes
// its own rules, in whichever mode it ran (`kube-proxy --cleanup`), and then its DaemonSet is deleted. The ConfigMap stays,
// so that kube-proxy can be restored. Established connections continue: connection tracking holds their translations. The
// call may be repeated after an error.
func RemoveKubeProxy(ctx context.Context, client *kube.Client, progress func(clean, want int)) error {
	sets := client.AppsV1().DaemonSets(kubeProxyNamespace)
	set, err := sets.Get(ctx, kubeProxy, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return ErrNoKubeProxy
	}
	if err != nil {
		return fmt.Errorf("look for kube-proxy: %w", err)
	}
	i := slices.IndexFunc(set.Spec.Template.Spec.Containers, func(c corev1.Container) bool { return c.Name == kubeProxy })
	if i < 0 {
		return fmt.Errorf("DaemonSet %s/%s has no container %s: it is not kubeadm's; remove it by hand", kubeProxyNamespace, kubeProxy, kubeProxy)
	}
	container := &set.Spec.Template.Spec.Containers[i]
	if !slices.Contains(container.Command, kubeProxyCleanup) {
		// The container ends each time, so a rolling update of one pod after another would not get far.
		all := intstr.FromString("100%")
		set.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable = &all
		container.Command = append(container.Command, kubeProxyCleanup)
		container.LivenessProbe, container.ReadinessProbe, container.StartupProbe = nil, nil, nil
		if _, err = sets.Update(ctx, set, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("make kube-proxy remove its rules: %w", err)
		}
	}
	for last := -1; ; {
		pods, err := client.CoreV1().Pods(kubeProxyNamespace).List(ctx, metav1.ListOptions{LabelSelector: kubeProxySelector})
		if err != nil {
			return fmt.Errorf("look for kube-proxy's pods: %w", err)
		}
		if set, err = sets.Get(ctx, kubeProxy, metav1.GetOptions{}); err != nil {
			return fmt.Errorf("look for kube-proxy: %w", err)
		}
		clean, want := 0, int(set.Status.DesiredNumberScheduled)
		for _, p := range pods.Items {
			if hasCleaned(p) {
				clean++
			}
		}
		if clean != last {
			progress(clean, want)
			last = clean
		}
		if clean >= want && set.Status.ObservedGeneration >= set.Generation {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for kube-proxy to remove its rules, which it has done on %d of %d nodes: %w", clean, want, context.Cause(ctx))
		case <-time.After(200 * time.Millisecond):
		}
	}
	if err := sets.Delete(ctx, kubeProxy, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete kube-proxy: %w", err)
	}
	return nil
}

// hasCleaned reports whether a pod's kube-proxy has removed its rules.
func hasCleaned(p corev1.Pod) bool {
	i := slices.IndexFunc(p.Spec.Containers, func(c corev1.Container) bool {
		return c.Name == kubeProxy && slices.Contains(c.Command, kubeProxyCleanup)
	})
	return i >= 0 && slices.ContainsFunc(p.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool {
		ended := func(t *corev1.ContainerStateTerminated) bool { return t != nil && t.ExitCode == 0 }
		return s.Name == kubeProxy && (ended(s.State.Terminated) || ended(s.LastTerminationState.Terminated))
	})
}
