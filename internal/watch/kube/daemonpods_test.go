package kube

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

func daemonSet() *appsv1.DaemonSet {
	return &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "agent", UID: "u1", Annotations: map[string]string{appsv1.DeprecatedTemplateGeneration: "1"}},
		Spec: appsv1.DaemonSetSpec{Template: corev1.PodTemplateSpec{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "agent"}},
			Spec:       corev1.PodSpec{HostNetwork: true, Containers: []corev1.Container{{Name: "agent", Image: "agent:1"}}},
		}},
	}
}

// TestCreateDaemonPods: a server that is not ready for pods is asked again; they are the DaemonSet's, and on their nodes.
func TestCreateDaemonPods(t *testing.T) {
	set := fake.NewClientset(daemonSet())
	var asked atomic.Int32
	set.PrependReactor("create", "pods", func(action clienttesting.Action) (bool, runtime.Object, error) {
		if asked.Add(1) <= 3 {
			return true, nil, apierrors.NewForbidden(corev1.Resource("pods"), "", errors.New("no PriorityClass with name system-node-critical was found"))
		}
		pod := action.(clienttesting.CreateAction).GetObject().(*corev1.Pod)
		pod.Name = pod.GenerateName + pod.Spec.NodeName // the fake server makes none
		return false, nil, nil
	})
	c := &Client{Interface: set}
	if err := c.CreateDaemonPods(t.Context(), "ns", "agent", []string{"a", "b"}); err != nil {
		t.Fatal(err)
	}
	pods, err := c.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var nodes []string
	for _, pod := range pods.Items {
		if !metav1.IsControlledBy(&pod, daemonSet()) || pod.GenerateName != "agent-" || pod.Labels["app"] != "agent" {
			t.Errorf("not the DaemonSet's: %+v", pod.ObjectMeta)
		}
		if pod.Labels["pod-template-generation"] != "1" || pod.Labels[appsv1.ControllerRevisionHashLabelKey] == "" {
			t.Errorf("the controller would replace it: %v", pod.Labels)
		}
		terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
		if len(terms) != 1 || !slices.Equal(terms[0].MatchFields[0].Values, []string{pod.Spec.NodeName}) {
			t.Errorf("bound to %s, and for %v", pod.Spec.NodeName, terms)
		}
		if len(pod.Spec.Tolerations) != 7 {
			t.Errorf("tolerates %v", pod.Spec.Tolerations)
		}
		nodes = append(nodes, pod.Spec.NodeName)
	}
	if slices.Sort(nodes); !slices.Equal(nodes, []string{"a", "b"}) {
		t.Errorf("pods on %v", nodes)
	}
}

// TestCreateDaemonPodsUntil: what ends the wait is told, with what was refused; what is wrong for good is told at once.
func TestCreateDaemonPodsUntil(t *testing.T) {
	for _, tc := range []struct {
		refusal error
		want    error
	}{
		{apierrors.NewForbidden(corev1.Resource("pods"), "", errors.New("not yet")), context.Canceled},
		{apierrors.NewBadRequest("no such field"), nil},
	} {
		set := fake.NewClientset(daemonSet())
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		set.PrependReactor("create", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			if tc.want != nil {
				cancel()
			}
			return true, nil, tc.refusal
		})
		err := (&Client{Interface: set}).CreateDaemonPods(ctx, "ns", "agent", []string{"a"})
		if !errors.Is(err, tc.refusal) || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("refused with %q: %v", tc.refusal, err)
		}
	}
}
