// Command fathom runs real multi-node, multi-cluster Kubernetes labs on one Linux machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/lab"
)

// version is set by the build.
var version = "devel"

func main() {
	// The first Ctrl-C makes the command end in a state from which it can continue. The second one kills it, and
	// `up` and `down` recover from that too.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	context.AfterFunc(ctx, stop)
	a := &app{paths: lab.DefaultPaths(), in: os.Stdin, out: os.Stdout, err: os.Stderr}
	err := a.root().ExecuteContext(ctx)
	os.Exit(exitStatus(err, ctx.Err() != nil))
}

func exitStatus(err error, interrupted bool) int {
	var exited programExit
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exited):
		return int(exited)
	}
	if interrupted {
		fmt.Fprintln(os.Stderr, "fathom: interrupted")
		return 130
	}
	fmt.Fprintln(os.Stderr, "fathom:", err)
	return 1
}

// app is what all commands share: the streams and the flags that select a lab.
type app struct {
	paths   lab.Paths
	in      *os.File
	out     *os.File
	err     *os.File
	name    string
	cluster string
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "fathom",
		Short: "Real multi-node, multi-cluster Kubernetes on one Linux machine, in seconds",
		Long: `fathom runs real Kubernetes clusters on one Linux machine: etcd, kube-apiserver, kubelet, containerd and
runc, unmodified, with Linux namespaces as nodes. No Docker, no VM, no download.

  fathom up                                  two clusters, east and west, of three nodes each
  fathom kubectl --cluster east -- get nodes
  fathom node shell east-worker1             a shell on a node
  fathom wire cut east-worker1               pull its cable
  fathom down                                leave nothing behind`,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Name() == "kubectl" {
				return nil // it treats proxies itself
			}
			if cmd.Flags().Lookup("kubeconfig") != nil {
				return nil // the cluster may be behind one
			}
			return withoutProxy()
		},
	}
	root.PersistentFlags().StringVar(&a.name, "name", "fathom", "the `lab` to work on")
	root.PersistentFlags().StringVar(&a.cluster, "cluster", "", "the `cluster` to work on (default: the first, or all where that makes sense)")
	_ = root.RegisterFlagCompletionFunc("name", a.completeLabs)
	_ = root.RegisterFlagCompletionFunc("cluster", a.completeClusters)
	root.AddCommand(a.up(), a.down(), a.save(), a.fork(), a.ls(), a.status(), a.kubectl(), a.kubeconfig(), a.node(), a.wire(), a.image(),
		a.install(), a.uninstall(), a.verify(), a.service(), a.policy(), a.drops(), a.ping(), a.ipam(), a.membership(), a.doctor(), a.version(), a.balancer(), a.bench(), a.benchPart(), a.man())
	for _, c := range root.Commands() {
		if c.HasSubCommands() && c.RunE == nil { // cobra would answer a mistyped subcommand with help and success
			c.Args, c.RunE, c.DisableFlagsInUseLine = cobra.NoArgs, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }, true
		}
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	return root
}

// withoutProxy makes fathom connect directly: its peers are all on this machine, which a proxy cannot reach.
func withoutProxy() error {
	for _, name := range []string{"HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"} {
		if err := os.Unsetenv(name); err != nil {
			return err
		}
	}
	return nil
}

// open opens the lab that the flags select.
func (a *app) open() (*lab.Lab, error) { return a.openNamed(a.name) }

// openNamed opens a lab. Only root can read its definition, since only root may have its nodes' credentials.
func (a *app) openNamed(name string) (*lab.Lab, error) {
	l, err := lab.Open(a.paths, name)
	if errors.Is(err, os.ErrPermission) {
		return nil, fmt.Errorf("%w: run it with sudo", err)
	}
	return l, err
}

func (a *app) completeLabs(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	names, _ := lab.Names(a.paths)
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeClusters(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	l, err := a.open()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, c := range l.Clusters {
		names = append(names, c.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeNodes completes the first argument with the names of nodes.
func (a *app) completeNodes(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	l, err := a.open()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, c := range l.Clusters {
		for _, n := range c.Nodes {
			names = append(names, n.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// requireRoot fails before the command would, half-way.
func requireRoot(cmd *cobra.Command, _ []string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("`%s` needs root, since nodes are namespaces, mounts and devices: run it with sudo", cmd.CommandPath())
	}
	return nil
}
