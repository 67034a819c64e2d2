// Command fathom-mirror is the registry mirror of a lab's node. The node's init runs it, and the node's containerd
// pulls from it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/lab/mirror"
)

func main() {
	node, _ := os.Hostname()
	listen := flag.String("listen", mirror.Address, "`HOST:PORT` to serve at")
	content := flag.String("content", "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256", "`directory` of containerd's blobs")
	socket := flag.String("containerd", "/run/containerd/containerd.sock", "containerd's `socket`")
	ctr := flag.String("ctr", "/usr/local/bin/ctr", "`program` to query containerd with")
	kubectl := flag.String("kubectl", "/usr/local/bin/kubectl", "`program` to write events with")
	kubeconfig := flag.String("kubeconfig", "/etc/kubernetes/kubelet.conf", "the node's credentials, a `file`")
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	containerd := mirror.Ctr{Program: *ctr, Socket: *socket}
	err := run(ctx, *listen, mirror.Options{Content: *content, Images: containerd.Images, Log: log}, mirror.Pods{Kubectl: *kubectl, Kubeconfig: *kubeconfig, Node: node, Log: log})
	if err != nil {
		fmt.Fprintln(os.Stderr, "fathom-mirror:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, listen string, o mirror.Options, p mirror.Pods) error {
	pods := mirror.NewPods(p)
	go pods.Run(ctx)
	o.StandIn = pods.StandIn

	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("listen at %s: %w", listen, err)
	}
	server := &http.Server{Handler: mirror.New(o), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve at %s: %w", listen, err)
	}
	return nil
}
