package kube_test

import (
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// TestReviewToken asks the real API server about a token that may, one that may not, and one that is nobody's.
func TestReviewToken(t *testing.T) {
	client, err := kube.Connect(testenv.APIServer(t))
	testenv.Must(t, err)
	objects, err := kube.Decode(strings.NewReader(`
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus, namespace: default}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: stranger, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: scrape}
rules: [{nonResourceURLs: [/metrics], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: scrape}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: scrape}
subjects: [{kind: ServiceAccount, name: prometheus, namespace: default}]
`))
	testenv.Must(t, err)
	testenv.Must(t, client.Apply(t.Context(), "test", objects))
	token := func(account string) string {
		r, err := client.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		testenv.Must(t, err)
		return r.Status.Token
	}
	for _, tc := range []struct {
		token, path    string
		known, allowed bool
	}{
		{token("prometheus"), "/metrics", true, true},
		{token("prometheus"), "/secrets", true, false},
		{token("stranger"), "/metrics", true, false},
		{"nonsense", "/metrics", false, false},
	} {
		known, allowed, err := client.ReviewToken(t.Context(), tc.token, tc.path)
		if err != nil || known != tc.known || allowed != tc.allowed {
			t.Errorf("%s: known %t, allowed %t, %v; want %t, %t", tc.path, known, allowed, err, tc.known, tc.allowed)
		}
	}
}
