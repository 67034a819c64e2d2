package lab

import (
	"context"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// nodeObject is the Node that the API server is given before the node's kubelet registers.
func (l *Lab) nodeObject(c *topology.Cluster, n *topology.Node) *corev1.Node {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{corev1.LabelOSStable: "linux"}}}
	// A kubelet that runs already believes what the API says of its node. From one that has no room for pods it
	// would turn the next static pod away, for good, before it has said itself what room there is.
	node.Status.Capacity = capacity(c.MaxPods(n))
	node.Status.Allocatable = node.Status.Capacity
	for k, v := range n.Labels {
		node.Labels[k] = v
	}
	for _, p := range n.PodCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, p.String())
	}
	node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	for _, t := range n.Taints {
		node.Spec.Taints = append(node.Spec.Taints, corev1.Taint{Key: t.Key, Value: t.Value, Effect: corev1.TaintEffect(t.Effect)})
	}
	if n.Role == topology.ControlPlane {
		// The labels of kubeadm's mark-control-plane. Its taint is among the node's own.
		node.Labels["node-role.kubernetes.io/control-plane"] = ""
		node.Labels["node.kubernetes.io/exclude-from-external-load-balancers"] = ""
	}
	return node
}

// capacity is what kubelet finds out of this machine, with its default limit of pods.
func capacity(pods int) corev1.ResourceList {
	have := corev1.ResourceList{
		corev1.ResourceCPU:  *resource.NewQuantity(int64(runtime.NumCPU()), resource.DecimalSI),
		corev1.ResourcePods: *resource.NewQuantity(int64(pods), resource.DecimalSI),
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		have[corev1.ResourceMemory] = *resource.NewQuantity(int64(info.Totalram)*int64(info.Unit), resource.BinarySI)
	}
	return have
}

// setNode makes a Node with these labels, taints and pod CIDRs, or gives them to the one that is there.
func setNode(ctx context.Context, client *kube.Client, want *corev1.Node) error {
	for {
		_, err := client.CoreV1().Nodes().Create(ctx, want, metav1.CreateOptions{})
		if err == nil {
			return nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create node %s: %w", want.Name, err)
		}
		have, err := client.CoreV1().Nodes().Get(ctx, want.Name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("read node %s: %w", want.Name, err)
		}
		if have.Spec.PodCIDR != "" && have.Spec.PodCIDR != want.Spec.PodCIDR {
			return fmt.Errorf("node %s has pod CIDR %s, which cannot be changed to %s", want.Name, have.Spec.PodCIDR, want.Spec.PodCIDR)
		}
		have.Spec.PodCIDR, have.Spec.PodCIDRs = want.Spec.PodCIDR, want.Spec.PodCIDRs
		have.Spec.Taints = mergeTaints(have.Spec.Taints, want.Spec.Taints)
		if have.Labels == nil {
			have.Labels = map[string]string{}
		}
		for k, v := range want.Labels {
			have.Labels[k] = v
		}
		_, err = client.CoreV1().Nodes().Update(ctx, have, metav1.UpdateOptions{})
		if apierrors.IsConflict(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("update node %s: %w", want.Name, err)
		}
		return nil
	}
}

func mergeTaints(have, want []corev1.Taint) []corev1.Taint {
	for _, w := range want {
		found := false
		for _, h := range have {
			found = found || h.MatchTaint(&w)
		}
		if !found {
			have = append(have, w)
		}
	}
	return have
}
