package lab

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

func TestSetNode(t *testing.T) {
	want := apiNode("a", corev1.ConditionUnknown, epoch)
	want.Labels = map[string]string{"disk": "fast"}
	want.Spec = corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"},
		Taints: []corev1.Taint{{Key: "dedicated", Value: "x", Effect: corev1.TaintEffectNoSchedule}}}

	registered := apiNode("a", corev1.ConditionTrue, epoch) // by a kubelet that was faster
	registered.Labels = map[string]string{"kubernetes.io/hostname": "a"}
	registered.Spec.Taints = []corev1.Taint{{Key: "node.kubernetes.io/not-ready", Effect: corev1.TaintEffectNoSchedule}, want.Spec.Taints[0]}
	other := registered.DeepCopy()
	other.Spec.PodCIDR = "10.244.7.0/24"

	for _, tc := range []struct {
		name string
		have *corev1.Node
		fail bool
	}{{"none", nil, false}, {"registered", registered, false}, {"with another pod CIDR", other, true}} {
		t.Run(tc.name, func(t *testing.T) {
			set := fake.NewClientset()
			if tc.have != nil {
				set = fake.NewClientset(tc.have.DeepCopy())
			}
			c := &kube.Client{Interface: set}
			err := setNode(t.Context(), c, want.DeepCopy())
			if (err != nil) != tc.fail {
				t.Fatalf("got %v", err)
			}
			if tc.fail {
				return
			}
			got, err := set.CoreV1().Nodes().Get(t.Context(), "a", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got.Spec.PodCIDR != "10.244.1.0/24" || got.Labels["disk"] != "fast" {
				t.Errorf("got %+v", got)
			}
			if tc.have != nil && (got.Labels["kubernetes.io/hostname"] != "a" || len(got.Spec.Taints) != 2) {
				t.Errorf("what kubelet set is gone, or a taint is there twice: %+v", got)
			}
		})
	}
}
