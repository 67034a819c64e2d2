package kube

import (
	"context"
	"fmt"
	"hash/fnv"
	"strconv"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/utils/dump"
)

// CreateDaemonPods makes the pods of a DaemonSet that its controller would make on the nodes, in a cluster whose controllers
// cannot begin yet. The DaemonSet controller finds them as its own. An API server that has only begun to serve refuses them
// until it has what they need; it is asked again until ctx ends.
func (c *Client) CreateDaemonPods(ctx context.Context, namespace, name string, nodes []string) error {
	set, err := c.AppsV1().DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("read DaemonSet %s/%s: %w", namespace, name, err)
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, node := range nodes {
		g.Go(func() error {
			err := again(gctx, func() error {
				_, err := c.CoreV1().Pods(namespace).Create(gctx, daemonPod(set, node), metav1.CreateOptions{})
				return err
			}, func(err error) bool {
				// Admission that has not heard of priority classes and service accounts yet forbids.
				return startsYet(err) || apierrors.IsForbidden(err)
			})
			if err != nil {
				return fmt.Errorf("create the pod of DaemonSet %s/%s on node %s: %w", namespace, name, node, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// daemonPod is the pod of a DaemonSet on a node, as k8s.io/kubernetes/pkg/controller/daemon makes it, and bound already.
func daemonPod(set *appsv1.DaemonSet, node string) *corev1.Pod {
	template := set.Spec.Template.DeepCopy()
	pod := &corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}
	pod.Namespace, pod.GenerateName = set.Namespace, set.Name+"-"
	pod.OwnerReferences = []metav1.OwnerReference{*metav1.NewControllerRef(set, appsv1.SchemeGroupVersion.WithKind("DaemonSet"))}
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	// The controller replaces pods that have neither its hash of the template nor the template's generation.
	hash := fnv.New32a()
	fmt.Fprintf(hash, "%v", dump.ForHash(set.Spec.Template))
	pod.Labels[appsv1.ControllerRevisionHashLabelKey] = rand.SafeEncodeString(strconv.FormatUint(uint64(hash.Sum32()), 10))
	pod.Labels["pod-template-generation"] = set.Annotations[appsv1.DeprecatedTemplateGeneration]
	pod.Spec.NodeName = node
	if pod.Spec.Affinity == nil {
		pod.Spec.Affinity = &corev1.Affinity{}
	}
	pod.Spec.Affinity.NodeAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchFields: []corev1.NodeSelectorRequirement{
			{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}},
		}}},
	}}
	tolerate := func(key string, effect corev1.TaintEffect) {
		pod.Spec.Tolerations = append(pod.Spec.Tolerations, corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: effect})
	}
	tolerate(corev1.TaintNodeNotReady, corev1.TaintEffectNoExecute)
	tolerate(corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute)
	tolerate(corev1.TaintNodeDiskPressure, corev1.TaintEffectNoSchedule)
	tolerate(corev1.TaintNodeMemoryPressure, corev1.TaintEffectNoSchedule)
	tolerate(corev1.TaintNodePIDPressure, corev1.TaintEffectNoSchedule)
	tolerate(corev1.TaintNodeUnschedulable, corev1.TaintEffectNoSchedule)
	if pod.Spec.HostNetwork {
		tolerate(corev1.TaintNodeNetworkUnavailable, corev1.TaintEffectNoSchedule)
	}
	return pod
}
