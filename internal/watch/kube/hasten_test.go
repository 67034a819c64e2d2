package kube

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
)

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
	(&Client{Interface: set}).HastenReady(ctx, "n", "app=x", "8181", "ready")
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
