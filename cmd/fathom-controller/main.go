// Command fathom-controller assigns addresses to Services of type LoadBalancer. One runs in a cluster, as a Deployment,
// deploy/fathom.yaml.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/controller"
	"github.com/fathom-network/fathom/internal/serve"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use:           "fathom-controller",
		Short:         "Assign addresses outside of the cluster to its Services",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(run())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "fathom-controller:", err)
		os.Exit(1)
	}
}

func run() *cobra.Command {
	var o controller.Options
	var kubeconfig string
	var level slog.Level
	host, _ := os.Hostname() // without a name, the process ID has to be unique
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Wait until no other controller leads, and assign addresses",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			var err error
			if o.Client, err = kube.Connect(kubeconfig); err != nil {
				return err
			}
			o.Log.Info("fathom-controller", "version", version)
			return controller.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "`file` with credentials (default: the pod's)")
	f.TextVar(&level, "log-level", slog.LevelInfo, "a `level`: debug, info, warn or error")
	f.StringVar(&o.Identity, "identity", envOr("POD_NAME", fmt.Sprintf("%s-%d", host, os.Getpid())), "this process's `name` in the leader election")
	f.DurationVar(&o.Resync, "resync", 30*time.Second, "how often to compare everything without an event")
	f.StringVar(&o.Health, "health-address", "127.0.0.1:10475", "`HOST:PORT` of the kubelet's probes, /healthz and /readyz; empty for none")
	f.StringVar(&o.Metrics, "metrics-address", ":10476", "`HOST:PORT` of metrics for Prometheus, /metrics; empty for none")
	f.StringVar((*string)(&o.MetricsAccess), "metrics-access", string(serve.Open), "who may read metrics: open (everyone), or authenticated (over TLS, with a token of the cluster whose user may get /metrics)")
	return cmd
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
