package kube

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/testenv"
)

// TestCutFrom: a watch of which the server is silent ends when its source address is gone, and not before; the next request
// goes by a new connection.
func TestCutFrom(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Query().Get("watch") == "" {
			_ = json.NewEncoder(w).Encode(corev1.NodeList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}})
			return
		}
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}))
	defer server.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	testenv.Must(t, os.WriteFile(path, []byte(`{"apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [{"name": "x", "cluster": {"server": "`+server.URL+`"}}],
		"users": [{"name": "x", "user": {}}], "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}]}`), 0o600))
	c, err := Connect(path)
	testenv.Must(t, err)
	w, err := c.CoreV1().Nodes().Watch(t.Context(), metav1.ListOptions{})
	testenv.Must(t, err)
	defer w.Stop()
	here := netip.MustParseAddr("127.0.0.1")
	if n := c.CutFrom(func(from netip.Addr) bool { return from != here }); n != 0 {
		t.Errorf("%d connections are cut of addresses that are there", n)
	}
	select {
	case e, open := <-w.ResultChan():
		t.Fatalf("the watch tells %v, %v", e, open)
	default:
	}
	if n := c.CutFrom(func(from netip.Addr) bool { return from == here }); n == 0 {
		t.Error("no connection is cut")
	}
	testenv.Eventually(t, "the watch ends", func() (bool, string) {
		select {
		case _, open := <-w.ResultChan():
			return !open, "it tells of an error"
		default:
			return false, "it hangs"
		}
	})
	_, err = c.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	testenv.Must(t, err)
}
