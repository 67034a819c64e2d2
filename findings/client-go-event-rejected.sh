#!/bin/sh
# An event that the API server answers with an error is dropped, even if the error is a passing one.
#
# Library:  k8s.io/client-go v0.36.3, tools/record; tools/events decides in the same way.
# Expected: a broadcaster tries again, up to 12 times, 10 s apart. One expects that of a 429, 500 or 503 before all.
# Instead:  it tries again only if there was no answer: a refused or cut connection. Any answer that is an API
#           status, whatever its code, ends the event after one request, with "Server rejected event (will not retry!)"
#           in the log. client-go's REST client repeats requests by itself only if the answer has a Retry-After
#           header. API Priority and Fairness sends one; the 429 of the admission plugin EventRateLimit has none.
# Known:    the comment in recordEvent takes every status for a malformed event. Losses by EventRateLimit are reported
#           in kubernetes/ingress-nginx#4146 and apecloud/kubeblocks#9273.
# Means:    events are lost to EventRateLimit, a failing webhook or an internal error, and survive an API server that is
#           down. What must be known later belongs in a condition in the object's status, which is written until it is there.
#
# Needs Go; no root.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOF'
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

// attempts says how often an event is sent whose first request fails with a status, or with 0 by a cut connection.
// Events go out one after the other, so with the second one's arrival the first is settled.
func attempts(status int) (sent int, stored bool) {
	var mu sync.Mutex
	settled := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		var event corev1.Event
		if err := json.Unmarshal(body, &event); err != nil {
			panic(err)
		}
		mu.Lock()
		defer mu.Unlock()
		if event.Reason == "First" {
			if sent++; sent == 1 {
				if status == 0 {
					panic(http.ErrAbortHandler)
				}
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(status)
				json.NewEncoder(w).Encode(metav1.Status{
					TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
					Status:   metav1.StatusFailure, Code: int32(status), Message: "for the moment",
				})
				return
			}
			stored = true
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		w.Write(body)
		if event.Reason == "Second" {
			close(settled)
		}
	}))
	defer server.Close()

	broadcaster := record.NewBroadcaster(record.WithSleepDuration(10 * time.Millisecond))
	defer broadcaster.Shutdown()
	client := typed.NewForConfigOrDie(&rest.Config{Host: server.URL})
	broadcaster.StartRecordingToSink(&typed.EventSinkImpl{Interface: client.Events("")})
	recorder := broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "finding"})
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "1"}}
	recorder.Event(pod, corev1.EventTypeWarning, "First", "what happened")
	recorder.Event(pod, corev1.EventTypeWarning, "Second", "what happened then")
	select {
	case <-settled:
	case <-time.After(30 * time.Second):
		fmt.Println("the second event did not arrive")
		os.Exit(1)
	}
	mu.Lock()
	defer mu.Unlock()
	return sent, stored
}

func main() {
	klog.SetLogger(klog.Logger{})
	holds := true
	for _, status := range []int{0, 429, 500, 503} {
		name := fmt.Sprintf("%d %s", status, http.StatusText(status))
		if status == 0 {
			name = "connection cut"
		}
		sent, stored := attempts(status)
		fmt.Printf("first request: %-25s requests: %d  stored: %v\n", name, sent, stored)
		holds = holds && stored == (status == 0)
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}
EOF
go mod init finding >/dev/null 2>&1
go get k8s.io/client-go@v0.36.3 >log 2>&1 || { cat log; exit 1; }
go build -o finding .
go list -m k8s.io/client-go
./finding 2>/dev/null
