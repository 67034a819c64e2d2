package kube

import (
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
)

// TestShrinkNode keeps of a node what says that it will soon not be there, and none of its other taints.
func TestShrinkNode(t *testing.T) {
	gone := &metav1.Time{}
	small := shrinkNode(&corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n", DeletionTimestamp: gone, ManagedFields: []metav1.ManagedFieldsEntry{{}}},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule},
			{Key: apinode.TaintToBeDeleted, Value: "1700000000", Effect: corev1.TaintEffectNoSchedule},
		}},
	})
	want := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n", DeletionTimestamp: gone},
		Spec:       corev1.NodeSpec{Taints: []corev1.Taint{{Key: apinode.TaintToBeDeleted, Effect: corev1.TaintEffectNoSchedule}}},
	}
	if !reflect.DeepEqual(small, want) {
		t.Errorf("%v, want %v", small, want)
	}
}
