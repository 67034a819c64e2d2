#!/bin/sh
# The newer event recorder throws away what a repeated event says: of a series only the first note is ever written.
#
# Library:  k8s.io/client-go v0.36.3, tools/events (events.k8s.io/v1), the successor of tools/record.
# Expected: two events of one object with one reason and different messages, such as two sets of causes why a pod
#           cannot be scheduled, both reach the API server. With tools/record they do.
# Instead:  tools/events takes events for the same if type, action, reason, reporter, regarding and related are equal.
#           The note is not compared. The second event becomes a patch that sets series.count to 2, without its note,
#           and those that follow only raise a counter, which is sent up to half an hour later.
# Known:    by design of the API (an Event's series), and argued for in kubernetes/kubernetes#112365, which at first had
#           the note in the comparison. Eventf's documentation does not say it.
# Means:    `kubectl describe` shows the first cause of a trouble that has long had another one. With this recorder,
#           what tells events apart belongs in the reason or action, or into `related`; what must be read, in a condition.
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
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/tools/record"
)

var notes = []string{"0/3 nodes are available: 3 Insufficient cpu", "0/3 nodes are available: 3 have no volume"}

// sent gives the two requests in which two events arrive, of which tell sends the one with that number.
func sent(start func(*kubernetes.Clientset) (tell func(int))) (requests [2]string) {
	arrived := make(chan string)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.Method == http.MethodPost {
			w.Header().Set("Content-Type", r.Header.Get("Content-Type")) // JSON or protobuf
			w.WriteHeader(http.StatusCreated)
			w.Write(body)
		} else {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"apiVersion":"events.k8s.io/v1","kind":"Event","metadata":{"name":"web","namespace":"default"}}`)
		}
		arrived <- r.Method + " " + string(body)
	}))
	defer server.Close()
	tell := start(kubernetes.NewForConfigOrDie(&rest.Config{Host: server.URL}))
	for i := range notes {
		tell(i)
		select {
		case requests[i] = <-arrived:
		case <-time.After(30 * time.Second):
			fmt.Println("not shown: event", i+1, "did not arrive")
			os.Exit(1)
		}
	}
	return requests
}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web", UID: "1"}}

	older := sent(func(c *kubernetes.Clientset) func(int) {
		b := record.NewBroadcaster(record.WithContext(ctx))
		b.StartRecordingToSink(&typed.EventSinkImpl{Interface: c.CoreV1().Events("")})
		r := b.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "finding"})
		return func(i int) { r.Event(pod, corev1.EventTypeWarning, "FailedScheduling", notes[i]) }
	})
	newer := sent(func(c *kubernetes.Clientset) func(int) {
		b := events.NewBroadcaster(&events.EventSinkImpl{Interface: c.EventsV1()})
		if err := b.StartRecordingToSinkWithContext(ctx); err != nil {
			panic(err)
		}
		r := b.NewRecorder(scheme.Scheme, "finding")
		return func(i int) { r.Eventf(pod, nil, corev1.EventTypeWarning, "FailedScheduling", "Scheduling", notes[i]) }
	})

	fmt.Printf("tools/record, second event: %s\n\ntools/events, second event: %s\n\n", older[1], newer[1])
	if !strings.Contains(older[1], notes[1]) || !strings.Contains(newer[0], notes[0]) || strings.Contains(newer[1], notes[1]) {
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
./finding
