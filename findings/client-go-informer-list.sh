#!/bin/sh
# An informer works without the right to list, until the day when it has to fall back.
#
# Library:  k8s.io/client-go v0.36.3, tools/cache: reflectors, and so all informers.
# Expected: informers need the verbs list and watch, and a role without list is found out by the first test.
# Instead:  since v0.35 the client feature WatchListClient is on: an informer asks for its first state, too, by a watch
#           (sendInitialEvents=true), for which API servers demand the verb watch alone. The verb list is used when that
#           request is refused, for example by an API server whose feature gate WatchList is off. Then the informer
#           never syncs, with "forbidden: ... cannot list".
# Known:    KEP-3157; that it falls back on any error came with kubernetes/kubernetes#120984. The opposite, a role without
#           watch, is kubernetes/kubernetes#129201.
# Means:    a role that lacks list passes all tests on one cluster and breaks on another. Write both verbs, and
#           test with KUBE_FEATURE_WatchListClient=false too.
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
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	typed "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

func refuse(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message,
	})
}

// run starts an informer against an API server that grants watch and not list, and says which verbs it used and
// what came first: that it had synced, or an error.
func run(knowsWatchList bool) (verbs []string, synced bool, first error) {
	var mu sync.Mutex
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		verb := "list"
		if r.URL.Query().Get("watch") != "" {
			verb = "watch"
		}
		mu.Lock()
		verbs = append(verbs, verb)
		mu.Unlock()
		switch {
		case verb == "list":
			refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "configmaps is forbidden: cannot list")
		case !knowsWatchList:
			refuse(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents: Forbidden")
		default:
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintln(w, `{"type":"ADDED","object":{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"a","namespace":"default","resourceVersion":"1"}}}`)
			fmt.Fprintln(w, `{"type":"BOOKMARK","object":{"apiVersion":"v1","kind":"ConfigMap","metadata":{"resourceVersion":"2","annotations":{"k8s.io/initial-events-end":"true"}}}}`)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	client := typed.NewForConfigOrDie(&rest.Config{Host: server.URL})
	informer := cache.NewSharedInformer(
		cache.NewListWatchFromClient(client.RESTClient(), "configmaps", "default", fields.Everything()), &corev1.ConfigMap{}, 0)
	failed := make(chan error, 1)
	informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
		select {
		case failed <- err:
		default:
		}
	})
	go informer.RunWithContext(ctx)
	for end := time.After(30 * time.Second); ; {
		select {
		case first = <-failed:
		case <-end:
			first = fmt.Errorf("nothing for 30 s")
		case <-time.After(10 * time.Millisecond):
			if synced = informer.HasSynced(); !synced {
				continue
			}
		}
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), verbs...), synced, first
	}
}

func main() {
	verbs, synced, err := run(true)
	fmt.Printf("the server knows watch-list:  verbs %v, synced %v, error %v\n", verbs, synced, err)
	holds := synced && len(verbs) == 1 && verbs[0] == "watch"
	verbs, synced, err = run(false)
	fmt.Printf("the server does not know it:  verbs %v, synced %v, error %v\n", verbs, synced, err)
	holds = holds && !synced && apierrors.IsForbidden(err)
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
