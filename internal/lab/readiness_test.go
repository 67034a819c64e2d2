package lab

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 600_000_000, time.UTC)

func apiNode(name string, ready corev1.ConditionStatus, heartbeat time.Time) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: ready, LastHeartbeatTime: metav1.NewTime(heartbeat)}}}}
}

func pod(name, on string, ready corev1.ConditionStatus, started time.Time) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "n", Labels: map[string]string{"app": "x"}},
		Spec:       corev1.PodSpec{NodeName: on},
		Status: corev1.PodStatus{
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}},
			ContainerStatuses: []corev1.ContainerStatus{{State: corev1.ContainerState{
				Running: &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(started)}}}},
		},
	}
}

// waits says whether f goes on waiting. One that should not has all the time that a slow machine takes.
func waits(t *testing.T, should bool, f func(context.Context) error) bool {
	t.Helper()
	limit := time.Minute
	if should {
		limit = 200 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	err := f(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	return err != nil
}

func TestWaitNodes(t *testing.T) {
	since := since{"b": epoch}
	sameSecond, before := epoch.Truncate(time.Second), epoch.Add(-time.Second)
	tainted := apiNode("b", corev1.ConditionTrue, epoch.Add(time.Hour))
	tainted.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule}}
	evicting := apiNode("b", corev1.ConditionTrue, epoch.Add(time.Hour))
	evicting.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}}
	for _, tc := range []struct {
		name  string
		b     *corev1.Node
		waits bool
	}{
		{"ready", apiNode("b", corev1.ConditionTrue, epoch.Add(time.Hour)), false},
		{"ready in the second in which it booted", apiNode("b", corev1.ConditionTrue, sameSecond), false},
		{"was ready before it booted", apiNode("b", corev1.ConditionTrue, before), true},
		{"not ready", apiNode("b", corev1.ConditionFalse, epoch.Add(time.Hour)), true},
		{"unknown", apiNode("b", corev1.ConditionUnknown, epoch.Add(time.Hour)), true},
		{"ready, and nothing may be scheduled yet", tainted, true},
		{"ready, and pods may be evicted", evicting, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &kube.Client{Interface: fake.NewClientset(apiNode("a", corev1.ConditionTrue, before), tc.b)}
			got := waits(t, tc.waits, func(ctx context.Context) error { return waitNodes(ctx, c, []string{"a", "b"}, 2, since) })
			if got != tc.waits {
				t.Errorf("waits %v, want %v", got, tc.waits)
			}
		})
	}
}

func TestWaitPods(t *testing.T) {
	since := since{"b": epoch}
	before := epoch.Add(-time.Minute)
	for _, tc := range []struct {
		name  string
		pods  []*corev1.Pod
		waits bool
	}{
		{"one on each", []*corev1.Pod{pod("1", "a", corev1.ConditionTrue, before), pod("2", "b", corev1.ConditionTrue, epoch)}, false},
		{"two on one", []*corev1.Pod{pod("1", "a", corev1.ConditionTrue, before), pod("2", "a", corev1.ConditionTrue, epoch)}, true},
		{"started before its node booted", []*corev1.Pod{pod("1", "a", corev1.ConditionTrue, before), pod("2", "b", corev1.ConditionTrue, before)}, true},
		{"not ready", []*corev1.Pod{pod("1", "a", corev1.ConditionTrue, before), pod("2", "b", corev1.ConditionFalse, epoch)}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			set := fake.NewClientset()
			for _, p := range tc.pods {
				if err := set.Tracker().Add(p); err != nil {
					t.Fatal(err)
				}
			}
			c := &kube.Client{Interface: set}
			got := waits(t, tc.waits, func(ctx context.Context) error { return waitPods(ctx, c, "n", "app=x", 2, since) })
			if got != tc.waits {
				t.Errorf("waits %v, want %v", got, tc.waits)
			}
		})
	}
}

func TestWaitFollowsChanges(t *testing.T) {
	set := fake.NewClientset(apiNode("a", corev1.ConditionFalse, epoch))
	c := &kube.Client{Interface: set}
	done := make(chan error, 1)
	go func() { done <- waitNodes(t.Context(), c, []string{"a"}, 1, nil) }()
	// Whether the change comes before the list, between list and watch, or after, it is seen.
	if _, err := set.CoreV1().Nodes().Update(t.Context(), apiNode("a", corev1.ConditionTrue, epoch), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		// The fake's watch tells nothing of what came before it, unlike an API server's: a further change does.
		if _, err := set.CoreV1().Nodes().Update(t.Context(), apiNode("a", corev1.ConditionTrue, epoch), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// notYet refuses a number of requests, and then answers.
type notYet struct{ left atomic.Int32 }

func (n *notYet) DoRaw(context.Context) ([]byte, error) {
	if n.left.Add(-1) >= 0 {
		return nil, errors.New("connection refused")
	}
	return nil, nil
}

func (n *notYet) Stream(context.Context) (io.ReadCloser, error) { return nil, errors.ErrUnsupported }

// Of the pods that run and are not ready, the one that answers is annotated, once.
func TestHastenReady(t *testing.T) {
	starting, ready := pod("starting", "b", corev1.ConditionFalse, epoch), pod("ready", "b", corev1.ConditionTrue, epoch)
	starting.UID, starting.Status.Phase = "1", corev1.PodRunning
	ready.UID, ready.Status.Phase = "2", corev1.PodRunning
	set := fake.NewClientset(starting, ready)
	var answer notYet
	answer.left.Store(2)
	set.AddProxyReactor("pods", func(clienttesting.Action) (bool, rest.ResponseWrapper, error) { return true, &answer, nil })

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	set.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		cancel()
		return false, nil, nil
	})
	hastenReady(ctx, &kube.Client{Interface: set}, "n", "app=x", "8181", "ready")
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
		t.Fatal("no pod is annotated")
	}
	for name, want := range map[string]string{"starting": "true", "ready": ""} {
		p, err := set.CoreV1().Pods("n").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Annotations["fathom.network/answers"]; got != want {
			t.Errorf("pod %s is annotated %q, want %q", name, got, want)
		}
	}
	if left := answer.left.Load(); left != -1 {
		t.Errorf("it was asked %d times more than needed", -1-left)
	}
}
