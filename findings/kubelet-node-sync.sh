#!/bin/sh
# A kubelet that starts while its API server answers does not look for its pods for a whole second.
#
# Library:  k8s.io/kubernetes v1.36.3, pkg/kubelet/config (NewSourceApiserver), as the kubelet itself uses it.
# Expected: the kubelet asks for its Node, and as soon as it has it, milliseconds later, for its pods.
# Instead:  it asks at once whether it has the Node, which a list that was begun a moment ago cannot have brought, and then sleeps for
#           WaitForAPIServerSyncPeriod, one second, before it asks again. Where the Node comes later it is up to a second as well.
# Known:    the constant has a comment ("the period between checks for the node list/watch initial sync"). No flag changes it.
# Means:    each start of a kubelet costs its pods a second, DaemonSets' as well: CNI plugins, and so the node's readiness. Static pods are not
#           concerned. No faster API server helps. What else has to be done on a node is best done in that second.
#
# Needs Go; no root. It compiles a part of the kubelet, which takes minutes the first time.
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
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/config"
)

type silent struct{}

func (silent) ObservedPodOnWatch(*corev1.Pod, time.Time) {}

func main() {
	klog.SetOutput(io.Discard)
	klog.LogToStderr(false)
	nodes, pods := make(chan time.Time, 100), make(chan time.Time, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		watch := r.URL.Query().Get("watch") != ""
		switch {
		case watch && r.URL.Query().Get("sendInitialEvents") != "":
			w.WriteHeader(http.StatusBadRequest) // then it lists
		case watch:
			<-r.Context().Done()
		case strings.HasSuffix(r.URL.Path, "/nodes"):
			io.WriteString(w, `{"apiVersion":"v1","kind":"NodeList","metadata":{"resourceVersion":"1"},"items":[]}`)
			nodes <- time.Now()
		case strings.HasSuffix(r.URL.Path, "/pods"):
			io.WriteString(w, `{"apiVersion":"v1","kind":"PodList","metadata":{"resourceVersion":"1"},"items":[]}`)
			pods <- time.Now()
		}
	}))
	client := kubernetes.NewForConfigOrDie(&rest.Config{Host: server.URL})

	// As NewMainKubelet does it.
	factory := informers.NewSharedInformerFactory(client, 0)
	synced := factory.Core().V1().Nodes().Informer().HasSynced
	factory.Start(context.Background().Done())
	start(client, synced)

	var node, pod time.Time
	for pod.IsZero() {
		select {
		case t := <-nodes:
			if node.IsZero() {
				node = t
			}
		case pod = <-pods:
		case <-time.After(20 * time.Second):
			fmt.Println("not shown: nobody asks for pods")
			os.Exit(1)
		}
	}
	wait := pod.Sub(node)
	fmt.Printf("the API server gave the Nodes, and was asked for the pods %.1f s later\n", wait.Seconds())
	if wait < 800*time.Millisecond || wait > 5*time.Second {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}

func start(client kubernetes.Interface, synced func() bool) {
	pods := config.NewPodConfig(record.NewFakeRecorder(100), silent{})
	ctx := context.Background()
	config.NewSourceApiserver(klog.FromContext(ctx), client, "node", synced, pods.Channel(ctx, "api"))
	go func() {
		for range pods.Updates() {
		}
	}()
}
EOF
go mod init finding >/dev/null 2>&1
# Of the modules that lie in Kubernetes' own repository its go.mod names no version.
gomod=$(go mod download -json k8s.io/kubernetes@v1.36.3 | sed -n 's/.*"GoMod": "\(.*\)",/\1/p')
staging=$(sed -n 's|^[[:space:]]*\(k8s.io/[a-z-]*\) v0.0.0\( // indirect\)*$|\1@v0.36.3|p' "$gomod")
go get k8s.io/kubernetes@v1.36.3 $staging >log 2>&1 || { cat log; exit 1; }
go build -o finding . || exit 1
go list -m k8s.io/kubernetes
./finding
