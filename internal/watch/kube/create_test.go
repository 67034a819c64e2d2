package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/rest"
)

const addOn = `# a comment
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: a, namespace: ns}
---
# nothing but a comment
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: b, namespace: ns}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: c}
`

// The server has no namespace at first, and has one of the objects already.
func TestCreate(t *testing.T) {
	var paths []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		paths = append(paths, r.Method+" "+r.URL.Path)
		status := metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure}
		switch len(paths) {
		case 1:
			status.Code, status.Reason = http.StatusNotFound, metav1.StatusReasonNotFound
		case 2:
			status.Code, status.Reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
			w.Header().Set("Retry-After", "3600")
		case 4:
			status.Code, status.Reason = http.StatusConflict, metav1.StatusReasonAlreadyExists
		case 6:
			status.Code, status.Reason = http.StatusForbidden, metav1.StatusReasonForbidden
		default:
			status.Code, status.Status = http.StatusCreated, metav1.StatusSuccess
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(int(status.Code))
		_ = json.NewEncoder(w).Encode(status)
	}))
	defer server.Close()
	c := &Client{config: &rest.Config{Host: server.URL}}
	if err := c.Create(t.Context(), []byte(addOn)); err != nil {
		t.Fatal(err)
	}
	accounts := "POST /api/v1/namespaces/ns/serviceaccounts"
	want := []string{accounts, accounts, accounts,
		"POST /apis/networking.k8s.io/v1/namespaces/ns/networkpolicies", "POST /apis/rbac.authorization.k8s.io/v1/clusterroles"}
	if !slices.Equal(paths, want) {
		t.Errorf("asked for %q, want %q", paths, want)
	}
	for _, bad := range []string{"kind: ServiceAccount", "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: refused}"} {
		if err := c.Create(t.Context(), []byte(bad)); err == nil {
			t.Errorf("%q gives no error", bad)
		}
	}
}

// An address of a Service that is refused is asked for again, what else is invalid is not.
func TestNoRangeYet(t *testing.T) {
	refused := func(name string) error {
		return fmt.Errorf("create: %w", apierrors.NewInvalid(schema.GroupKind{Kind: "Service"}, "dns",
			field.ErrorList{field.Invalid(field.NewPath("spec", name), []string{"10.96.0.10"}, "the provided network does not match the current range")}))
	}
	if !startsYet(refused("clusterIPs")) {
		t.Error("a Service without a range is not asked for again")
	}
	if startsYet(refused("ports")) {
		t.Error("a Service that is invalid is asked for again")
	}
}
