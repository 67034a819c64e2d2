package agent

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
)

func TestTurning(t *testing.T) {
	began := time.Now()
	loop := turning{patience: passPatience(30 * time.Second)}
	loop.set(began)
	for after, want := range map[time.Duration]string{0: "", 3 * time.Minute: "", 4 * time.Minute: "the last pass over the node ended 4m0s ago"} {
		err := loop.alive(began.Add(after))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("after %v: %v, want %q", after, err, want)
		}
	}
	loop.set(began.Add(4 * time.Minute))
	if err := loop.alive(began.Add(5 * time.Minute)); err != nil {
		t.Errorf("after another pass: %v", err)
	}
	for age, want := range map[time.Duration]int{0: http.StatusOK, time.Hour: http.StatusServiceUnavailable} {
		loop.set(time.Now().Add(-age))
		answer := httptest.NewRecorder()
		loop.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/healthz", nil))
		if answer.Code != want {
			t.Errorf("the kubelet gets %d, %q after %v, want %d", answer.Code, answer.Body, age, want)
		}
	}
}

func TestLeaves(t *testing.T) {
	drained := corev1.Taint{Key: apinode.TaintToBeDeleted, Effect: corev1.TaintEffectNoSchedule}
	for name, tc := range map[string]struct {
		node  corev1.Node
		found bool
		want  bool
	}{
		"there":             {found: true},
		"cordoned":          {node: corev1.Node{Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: corev1.TaintNodeUnschedulable}}}}, found: true},
		"to be deleted":     {node: corev1.Node{Spec: corev1.NodeSpec{Taints: []corev1.Taint{drained}}}, found: true, want: true},
		"being deleted":     {node: corev1.Node{ObjectMeta: metav1.ObjectMeta{DeletionTimestamp: &metav1.Time{}}}, found: true, want: true},
		"not there (again)": {want: true},
	} {
		if got := leaves(&tc.node, tc.found); got != tc.want {
			t.Errorf("%s: %t, want %t", name, got, tc.want)
		}
	}
}
