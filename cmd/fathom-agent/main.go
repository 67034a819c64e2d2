// Command fathom-agent keeps the network of one node. It runs on every node as a DaemonSet, deploy/fathom.yaml.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/agent"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/serve"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// version is set by the build.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use:           "fathom-agent",
		Short:         "Keep the pod network of one node of a Kubernetes cluster",
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(run(), clean(), release(), probePackets())
	root.AddCommand(questions()...)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "fathom-agent:", err)
		os.Exit(1)
	}
}

func run() *cobra.Command {
	o := agent.Options{Paths: agent.NodePaths()}
	var kubeconfig string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Make this node's kernel match the API, and keep it so",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Node == "" {
				return errors.New("the name of this node is unknown: give --node, or set NODE_NAME")
			}
			if o.FastPath != "" && o.FastPath != agent.FastPathAuto && o.FastPath != agent.FastPathOff {
				return fmt.Errorf("--fast-path %q: want auto or off", o.FastPath)
			}
			switch o.PolicyEstablished {
			case "", netconf.PolicyRecheck, netconf.PolicyKeep:
			default:
				return fmt.Errorf("--policy-established %q: want recheck or keep", o.PolicyEstablished)
			}
			o.Log = slog.New(slog.NewJSONHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			var err error
			if o.Client, err = kube.Connect(kubeconfig); err != nil {
				return err
			}
			o.Log.Info("fathom-agent", "version", version, "node", o.Node)
			return agent.Run(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Node, "node", os.Getenv("NODE_NAME"), "the `name` of this node's Node object")
	f.StringVar(&kubeconfig, "kubeconfig", "", "`file` with credentials (default: the pod's)")
	f.TextVar(&level, "log-level", slog.LevelInfo, "a `level`: debug, info, warn or error")
	f.StringVar(&o.Metrics, "metrics-address", ":10471", "where to serve /metrics")
	f.StringVar((*string)(&o.MetricsAccess), "metrics-access", string(serve.Open), "who may read metrics: open (everyone), or authenticated (over TLS, with a token of the cluster whose user may get /metrics)")
	f.DurationVar(&o.Resync, "resync", 30*time.Second, "how often to compare everything without an event")
	f.StringVar(&o.Paths.Plugin, "plugin", "/fathom-cni", "the CNI plugin to install; empty for none")
	f.StringVar(&o.FastPath, "fast-path", "", "auto or off; overrides the configuration")
	f.StringVar((*string)(&o.PolicyEstablished), "policy-established", "", "recheck (end connections that are there when a policy forbids them) or keep; overrides the configuration")
	registerPaths(f, &o)
	return cmd
}

// registerPaths registers the flags that say where the node's directories are.
func registerPaths(f *pflag.FlagSet, o *agent.Options) {
	f.StringVar(&o.Health, "health-address", "127.0.0.1:10470", "where to serve /healthz and /readyz")
	f.StringVar(&o.Paths.CNIBin, "cni-bin", "/host/opt/cni/bin", "the node's directory of CNI plugins")
	f.StringVar(&o.Paths.Conflist, "conflist", "/host/etc/cni/net.d/10-fathom.conflist", "the file to write when the node can carry pods")
	f.StringVar(&o.Paths.Leases, "leases", o.Paths.Leases, "the directory of the plugin's leases")
	f.StringVar(&o.Paths.Socket, "socket", o.Paths.Socket, "where to listen for the plugin")
	f.StringVar(&o.Paths.BPF, "bpf-dir", o.Paths.BPF, "where to pin the fast path, on a bpffs")
	f.StringVar(&o.Paths.Cgroup, "cgroup-dir", "/host/sys/fs/cgroup", "where the node has its cgroup file systems")
	f.StringVar(&o.Paths.NetNS, "netns-dir", o.Paths.NetNS, "where the runtime mounts pods' network namespaces")
	f.StringVar(&o.Paths.Sysctl, "sysctl-dir", "/host/proc/sys/net", "/proc/sys/net, or another mount of it that is writable")
}
