package kube

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 600_000_000, time.UTC)

func node(name string, ready corev1.ConditionStatus, heartbeat time.Time) *corev1.Node {
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
	since := Since{"b": epoch}
	sameSecond, before := epoch.Truncate(time.Second), epoch.Add(-time.Second)
	tainted := node("b", corev1.ConditionTrue, epoch.Add(time.Hour))
	tainted.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoSchedule}}
	evicting := node("b", corev1.ConditionTrue, epoch.Add(time.Hour))
	evicting.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeNotReady, Effect: corev1.TaintEffectNoExecute}}
	for _, tc := range []struct {
		name  string
		b     *corev1.Node
		waits bool
	}{
		{"ready", node("b", corev1.ConditionTrue, epoch.Add(time.Hour)), false},
		{"ready in the second in which it booted", node("b", corev1.ConditionTrue, sameSecond), false},
		{"was ready before it booted", node("b", corev1.ConditionTrue, before), true},
		{"not ready", node("b", corev1.ConditionFalse, epoch.Add(time.Hour)), true},
		{"unknown", node("b", corev1.ConditionUnknown, epoch.Add(time.Hour)), true},
		{"ready, and nothing may be scheduled yet", tainted, true},
		{"ready, and pods may be evicted", evicting, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &Client{Interface: fake.NewClientset(node("a", corev1.ConditionTrue, before), tc.b)}
			got := waits(t, tc.waits, func(ctx context.Context) error { return c.WaitNodes(ctx, []string{"a", "b"}, 2, since) })
			if got != tc.waits {
				t.Errorf("waits %v, want %v", got, tc.waits)
			}
		})
	}
}

func TestWaitPods(t *testing.T) {
	since := Since{"b": epoch}
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
			c := &Client{Interface: set}
			got := waits(t, tc.waits, func(ctx context.Context) error { return c.WaitPods(ctx, "n", "app=x", 2, since) })
			if got != tc.waits {
				t.Errorf("waits %v, want %v", got, tc.waits)
			}
		})
	}
}

func TestWaitFollowsChanges(t *testing.T) {
	set := fake.NewClientset(node("a", corev1.ConditionFalse, epoch))
	c := &Client{Interface: set}
	done := make(chan error, 1)
	go func() { done <- c.WaitNodes(t.Context(), []string{"a"}, 1, nil) }()
	// Whether the change comes before the list, between list and watch, or after, it is seen.
	if _, err := set.CoreV1().Nodes().Update(t.Context(), node("a", corev1.ConditionTrue, epoch), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		// The fake's watch tells nothing of what came before it, unlike an API server's: a further change does.
		if _, err := set.CoreV1().Nodes().Update(t.Context(), node("a", corev1.ConditionTrue, epoch), metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

func TestSetNode(t *testing.T) {
	want := node("a", corev1.ConditionUnknown, epoch)
	want.Labels = map[string]string{"disk": "fast"}
	want.Spec = corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"},
		Taints: []corev1.Taint{{Key: "dedicated", Value: "x", Effect: corev1.TaintEffectNoSchedule}}}

	registered := node("a", corev1.ConditionTrue, epoch) // by a kubelet that was faster
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
			c := &Client{Interface: set}
			err := c.SetNode(t.Context(), want.DeepCopy())
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

func TestWaitHealthy(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked++; asked < 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer server.Close()
	if err := WaitHealthy(t.Context(), server.Client(), server.URL); err != nil || asked != 3 {
		t.Errorf("after %d requests: %v; want none after 3", asked, err)
	}
	server.Close()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("not within its time"))
	defer cancel()
	err := WaitHealthy(ctx, server.Client(), server.URL)
	if err == nil || !strings.Contains(err.Error(), "not within its time") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a server that is gone gives %v; want the time and the last answer", err)
	}
}
