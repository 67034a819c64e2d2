package kube

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

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
