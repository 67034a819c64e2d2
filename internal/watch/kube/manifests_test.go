package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/fathom-network/fathom/internal/facts/manifest"
)

// server is an API server of a few kinds, which takes objects when what they need is there.
type server struct {
	mu      sync.Mutex
	applied []string
	refused map[string][]metav1.Status // by path, what it answers before it takes the object
	bodies  map[string]string
}

func refusal(code int32, reason metav1.StatusReason, message string) metav1.Status {
	return metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: code, Reason: reason, Message: message}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := func(code int32, value any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(int(code))
		_ = json.NewEncoder(w).Encode(value)
	}
	has := func(path string) bool { return slices.Contains(s.applied, path) }
	if r.Method == http.MethodGet {
		list := metav1.APIResourceList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "APIResourceList"}}
		switch {
		case r.URL.Path == "/api/v1":
			list.APIResources = []metav1.APIResource{{Name: "namespaces", Kind: "Namespace"}, {Name: "configmaps", Kind: "ConfigMap", Namespaced: true},
				{Name: "configmaps/odd", Kind: "Odd", Namespaced: true}, {Name: "services", Kind: "Service", Namespaced: true}}
		case r.URL.Path == "/apis/apiextensions.k8s.io/v1":
			list.APIResources = []metav1.APIResource{{Name: "customresourcedefinitions", Kind: "CustomResourceDefinition"}}
		case r.URL.Path == "/apis/apps/v1":
			list.APIResources = []metav1.APIResource{{Name: "deployments", Kind: "Deployment", Namespaced: true}}
		case r.URL.Path == "/apis/sheep.example/v1" && has("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/sheep.sheep.example"):
			list.APIResources = []metav1.APIResource{{Name: "flock", Kind: "Sheep", Namespaced: true}}
		default:
			answer(http.StatusNotFound, refusal(http.StatusNotFound, metav1.StatusReasonNotFound, "the server could not find the requested resource"))
			return
		}
		answer(http.StatusOK, list)
		return
	}
	if q := r.URL.Query(); r.Method != http.MethodPatch || q.Get("fieldManager") != "me" || q.Get("force") != "true" ||
		q.Get("fieldValidation") != "Strict" || r.Header.Get("Content-Type") != "application/apply-patch+yaml" {
		answer(http.StatusTeapot, refusal(http.StatusTeapot, "", r.Method+" "+r.URL.String()))
		return
	}
	path := r.URL.Path
	if left := s.refused[path]; len(left) > 0 {
		s.refused[path] = left[1:]
		answer(left[0].Code, left[0])
		return
	}
	if _, inside, is := strings.Cut(path, "/namespaces/far/"); is && !has("/api/v1/namespaces/far") {
		answer(http.StatusNotFound, refusal(http.StatusNotFound, metav1.StatusReasonNotFound, `namespaces "far" not found for `+inside))
		return
	}
	data, _ := io.ReadAll(r.Body)
	s.applied = append(s.applied, path)
	s.bodies[path] = string(data)
	answer(http.StatusOK, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusSuccess})
}

// against returns a server that refuses that, and what applies a manifest there.
func against(t *testing.T, refused map[string][]metav1.Status, nodes <-chan struct{}) (*server, func(ctx context.Context, text string) error) {
	t.Helper()
	s := &server{refused: refused, bodies: map[string]string{}}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	c, err := connect(&rest.Config{Host: web.URL})
	if err != nil {
		t.Fatal(err)
	}
	return s, func(ctx context.Context, text string) error {
		objects, problems := manifest.Parse([]byte(text), "app.yaml")
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		return c.ApplyManifests(ctx, "me", objects, nodes, func(string) {})
	}
}

// Objects come in the wrong order, and what they need takes its time.
func TestApplyManifests(t *testing.T) {
	starts := refusal(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "starting")
	webhook := refusal(http.StatusInternalServerError, metav1.StatusReasonInternalError, "failed calling webhook")
	account := refusal(http.StatusForbidden, metav1.StatusReasonForbidden, "no service account")
	s, apply := against(t, map[string][]metav1.Status{
		"/api/v1/namespaces/far":                                {starts},
		"/apis/sheep.example/v1/namespaces/default/flock/dolly": {webhook},
		"/api/v1/namespaces/far/configmaps/b":                   {account},
	}, nil)
	err := apply(t.Context(), `
{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}
---
{apiVersion: sheep.example/v1, kind: Sheep, metadata: {name: dolly}, spec: {legs: 4}}
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: b, namespace: far}}
---
{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: sheep.sheep.example}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: far}}
`)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(s.applied)
	want := []string{
		"/api/v1/namespaces/far",
		"/api/v1/namespaces/far/configmaps/b",
		"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/sheep.sheep.example",
		"/apis/apps/v1/namespaces/default/deployments/web",
		"/apis/sheep.example/v1/namespaces/default/flock/dolly",
	}
	if !slices.Equal(s.applied, want) {
		t.Errorf("applied %q, want %q", s.applied, want)
	}
	if body := s.bodies[want[4]]; !strings.Contains(body, `"legs":4`) {
		t.Errorf("sent %s", body)
	}
}

// What has pods waits for nodes, and holds up nothing else.
func TestApplyPods(t *testing.T) {
	const text = `
{apiVersion: apps/v1, kind: Deployment, metadata: {name: web, namespace: far}}
---
{apiVersion: sheep.example/v1, kind: Sheep, metadata: {name: dolly}}
---
{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: sheep.sheep.example}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: far}}
`
	const web = "/apis/apps/v1/namespaces/far/deployments/web"
	starts := refusal(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, "starting")
	nodes := make(chan struct{})
	s, apply := against(t, map[string][]metav1.Status{"/apis/sheep.example/v1/namespaces/default/flock/dolly": {starts, starts}}, nodes)
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, errors.New("not within a second"))
	defer cancel()
	const want = "apply Deployment far/web (app.yaml:2): not within a second (last: no nodes are ready for pods yet)"
	if err := apply(ctx, text); err == nil || err.Error() != want {
		t.Errorf("without nodes: %v, want %s", err, want)
	}
	if slices.Contains(s.applied, web) || len(s.applied) != 3 {
		t.Errorf("without nodes %q are applied", s.applied)
	}
	close(nodes)
	if err := apply(t.Context(), text); err != nil || !slices.Contains(s.applied, web) {
		t.Errorf("with nodes: %v, %q", err, s.applied)
	}
}

// What will never be taken is told at once: the object, its place, and the server's reason.
func TestApplyRefused(t *testing.T) {
	for _, tc := range []struct{ object, want string }{
		{"{apiVersion: v1, kind: ConfigMap, metadata: {name: invalid}}", "apply ConfigMap invalid (app.yaml:3): it is wrong"},
		{"{apiVersion: v1, kind: ConfigMap, metadata: {name: bad, namespace: x}}", "apply ConfigMap x/bad (app.yaml:3): it is bad"},
		{"{apiVersion: apps/v1, kind: Deploymnt, metadata: {name: a}}", "apply Deploymnt a (app.yaml:3): the API server has no kind Deploymnt of apps/v1"},
		{"{apiVersion: app/v1, kind: Deployment, metadata: {name: a}}", "apply Deployment a (app.yaml:3): the API server has no kind Deployment of app/v1"},
		{"{apiVersion: v1, kind: Odd, metadata: {name: a}}", "apply Odd a (app.yaml:3): the API server has no kind Odd of v1"},
	} {
		_, apply := against(t, map[string][]metav1.Status{
			"/api/v1/namespaces/default/configmaps/invalid": {refusal(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "it is wrong")},
			"/api/v1/namespaces/x/configmaps/bad":           {refusal(http.StatusBadRequest, metav1.StatusReasonBadRequest, "it is bad")},
		}, nil)
		err := apply(t.Context(), "{apiVersion: v1, kind: ConfigMap, metadata: {name: good}}\n---\n"+tc.object)
		if err == nil || err.Error() != tc.want {
			t.Errorf("got %v, want %s", err, tc.want)
		}
	}
}

// What is refused keeps nothing else from being applied: not what the server takes a moment later, and not what waits for
// nodes.
func TestApplyBesideRefused(t *testing.T) {
	starts := refusal(http.StatusNotFound, metav1.StatusReasonNotFound, `namespaces "default" not found`)
	nodes := make(chan struct{})
	s, apply := against(t, map[string][]metav1.Status{
		"/api/v1/namespaces/default/configmaps/fine":    {starts, starts},
		"/api/v1/namespaces/default/configmaps/invalid": {refusal(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "it is wrong")},
		"/api/v1/namespaces/default/configmaps/bad":     {refusal(http.StatusBadRequest, metav1.StatusReasonBadRequest, "it is bad")},
	}, nodes)
	time.AfterFunc(500*time.Millisecond, func() { close(nodes) })
	err := apply(t.Context(), `
{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}}
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: fine}}
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: invalid}}
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: bad}}
`)
	const want = "apply ConfigMap invalid (app.yaml:6): it is wrong\napply ConfigMap bad (app.yaml:8): it is bad"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	slices.Sort(s.applied)
	if want := []string{"/api/v1/namespaces/default/configmaps/fine", "/apis/apps/v1/namespaces/default/deployments/web"}; !slices.Equal(s.applied, want) {
		t.Errorf("applied %q, want %q", s.applied, want)
	}
}

// What waits for the refused object is not waited for to the end.
func TestApplyBelowRefused(t *testing.T) {
	_, apply := against(t, map[string][]metav1.Status{
		"/api/v1/namespaces/far": {refusal(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "it is wrong")},
	}, nil)
	err := apply(t.Context(), `
{apiVersion: v1, kind: Namespace, metadata: {name: far}}
---
{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: far}}
`)
	const want = "apply Namespace far (app.yaml:2): it is wrong\n" +
		`apply ConfigMap far/a (app.yaml:4): not waited for any longer (last: namespaces "far" not found for configmaps/a)`
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// The end of the time tells what was waited for, not that the last request was cut off.
func TestApplyInVain(t *testing.T) {
	_, apply := against(t, nil, nil)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 300*time.Millisecond, errors.New("not within a moment"))
	defer cancel()
	err := apply(ctx, "{apiVersion: goat.example/v1, kind: Goat, metadata: {name: a}}\n---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: far}}")
	const want = "apply Goat a (app.yaml:1) and 1 more: not within a moment (last: the API server has no kind Goat of goat.example/v1 yet)"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestMayCome(t *testing.T) {
	status := func(code int32, reason metav1.StatusReason, field string) error {
		s := refusal(code, reason, "x")
		s.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Field: field}}}
		return fmt.Errorf("wrapped: %w", &apierrors.StatusError{ErrStatus: s})
	}
	for _, tc := range []struct {
		err   error
		after time.Duration
		want  bool
	}{
		{errors.New("connection refused"), time.Minute, true},
		{status(404, metav1.StatusReasonNotFound, ""), time.Minute, true},
		{status(403, metav1.StatusReasonForbidden, ""), time.Minute, true},
		{status(409, metav1.StatusReasonConflict, ""), time.Minute, true},
		{status(429, metav1.StatusReasonTooManyRequests, ""), time.Minute, true},
		{status(500, metav1.StatusReasonInternalError, ""), time.Minute, true},
		{status(500, metav1.StatusReasonUnknown, ""), 0, false}, // a field that its kind has not
		{status(400, metav1.StatusReasonBadRequest, ""), 0, false},
		{status(413, metav1.StatusReasonRequestEntityTooLarge, ""), 0, false},
		{status(422, metav1.StatusReasonInvalid, "spec.ports"), 0, false},
		{status(422, metav1.StatusReasonInvalid, "spec.clusterIPs"), 0, true},
		{status(422, metav1.StatusReasonInvalid, "spec.clusterIPs"), time.Minute, false},
	} {
		if got := mayCome(tc.err, tc.after); got != tc.want {
			t.Errorf("%v after %v: %v, want %v", tc.err, tc.after, got, tc.want)
		}
	}
}
