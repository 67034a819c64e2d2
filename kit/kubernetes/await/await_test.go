package await

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const kubeconfig = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %SERVER%}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`

func TestHealthyAsksUntilTheServerIs(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/healthz" {
			t.Errorf("it asked for %s", r.URL.Path)
		}
		if asked++; asked < 3 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer server.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	config := []byte(strings.ReplaceAll(kubeconfig, "%SERVER%", server.URL))
	if err := os.WriteFile(path, config, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--v=2", "--kubeconfig=" + path}, {"--kubeconfig", path}} {
		asked = 0
		Healthy(args, time.Minute, time.Millisecond)
		if asked != 3 {
			t.Errorf("%v: asked %d times, and the third answer was good", args, asked)
		}
	}
}

func TestHealthyGivesUp(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close() // nobody listens there
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(kubeconfig, "%SERVER%", server.URL)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"--kubeconfig=" + path}, {"--kubeconfig=" + path + ".missing"}, {"--kubeconfig"}, nil} {
		Healthy(args, 10*time.Millisecond, time.Millisecond)
	}
}
