package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

func (a *app) install() *cobra.Command {
	var t target
	var o install.Options
	var registry string
	var dryRun, noWait, replaceKubeProxy bool
	var set, nodes []string
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the network on a cluster, or change an installation",
		Long: `Installs Fathom's pod network on any Kubernetes cluster whose nodes have podCIDRs, with the manifests of
deploy/fathom.yaml. Installing again changes what differs, and keeps settings that are not named. docs/install.md
says how to replace another network.

With --replace-kube-proxy the agents carry Services as well. Once every node's kernel is verified to do so, kube-proxy
removes its rules and is deleted. Established connections continue.

` + targetHelp,
		Example: `  fathom install
  fathom install --set mode=vxlan --set mtu=1400
  fathom install --registry registry.example/net
  fathom install --replace-kube-proxy
  fathom install --dry-run > fathom.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Config, err = parsePairs("--set", set); err != nil {
				return err
			}
			if o.Nodes, err = parsePairs("--nodes", nodes); err != nil {
				return err
			}
			if _, said := o.Config["serviceProxy"]; replaceKubeProxy && !said {
				o.Config["serviceProxy"] = string(netconf.ProxyAuto)
			}
			if replaceKubeProxy && o.Config["serviceProxy"] == string(netconf.ProxyOff) {
				return errors.New("--replace-kube-proxy with --set serviceProxy=off: nothing would carry Services")
			}
			if registry != "" {
				if o.Image, o.DNSImage, err = imagesIn(registry); err != nil {
					return fmt.Errorf("--registry: %w", err)
				}
			}
			if dryRun && o.APIServer != "" {
				return a.printManifests(o)
			}
			client, name, err := a.connect(cmd, t)
			if err != nil && dryRun { // without a cluster: the manifests as they are
				return a.printManifests(o)
			}
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("not within %v", timeout))
			defer cancel()
			if o.APIServer == "" {
				if o.APIServer, err = install.APIServer(ctx, client); err != nil {
					return err
				}
			}
			if dryRun {
				return a.printManifests(o)
			}
			fmt.Fprintf(a.out, "Installing the network on %s.\n", name)
			if err := install.Apply(ctx, client, o); err != nil {
				return err
			}
			if noWait {
				return nil
			}
			if err := install.Wait(ctx, client, func(ready, want int32) { fmt.Fprintf(a.out, "  %d of %d nodes carry pods\n", ready, want) }); err != nil {
				return fmt.Errorf("%w\nsee `kubectl -n fathom-system describe pods` and `kubectl -n fathom-system logs ds/fathom-agent`", err)
			}
			if replaceKubeProxy {
				if err := a.replaceKubeProxy(ctx, client); err != nil {
					return err
				}
			}
			fmt.Fprintln(a.out, "The network is installed. `fathom verify pods` and `fathom ping --all` prove it.")
			return nil
		},
	}
	t.register(cmd)
	f := cmd.Flags()
	f.StringVar(&o.Image, "image", "", "the agent's `image` (default: the manifests')")
	f.StringVar(&o.DNSImage, "dns-image", "", "the `image` of nodes' DNS cache, for --set dns=node-cache (default: the manifests')")
	f.StringVar(&registry, "registry", "", "take the images from this `REGISTRY/PATH`, by the digests of those that were built with this fathom")
	f.StringVar(&o.DNSConfig, "dns-config", "", "the `ConfigMap` of kube-system with CoreDNS's Corefile, for the nodes' DNS cache (default: coredns)")
	f.StringVar(&o.APIServer, "api-server", "", "`HOST:PORT` at which nodes reach the API server without a Service proxy (default: as the cluster says)")
	f.BoolVar(&o.AuthenticatedMetrics, "authenticated-metrics", false, "agents and controller serve metrics over TLS only, and only to tokens of the cluster whose user may get /metrics")
	f.StringArrayVar(&set, "set", nil, "a setting of ConfigMap fathom-config, `KEY=VALUE`; may be repeated")
	f.StringArrayVar(&nodes, "nodes", nil, "only on nodes with this label, `KEY=VALUE`; may be repeated (default: every node)")
	f.BoolVar(&replaceKubeProxy, "replace-kube-proxy", false, "carry Services, too, and remove kube-proxy from the cluster when every node does")
	f.BoolVar(&dryRun, "dry-run", false, "print the manifests and do nothing")
	f.BoolVar(&noWait, "no-wait", false, "do not wait until every node carries pods")
	f.DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait")
	cmd.MarkFlagsMutuallyExclusive("registry", "image")
	cmd.MarkFlagsMutuallyExclusive("registry", "dns-image")
	cmd.MarkFlagsMutuallyExclusive("replace-kube-proxy", "no-wait")
	cmd.MarkFlagsMutuallyExclusive("replace-kube-proxy", "nodes")
	return cmd
}

// imagesIn returns the names of the network's images in a registry.
func imagesIn(registry string) (agent, dns string, err error) {
	k, err := kit.Find()
	if err != nil {
		return "", "", err
	}
	n, err := image.ReadNetwork(k, version)
	if err != nil {
		return "", "", err
	}
	return n.In(registry)
}

// replaceKubeProxy removes kube-proxy once every node's kernel is verified to carry all Services.
func (a *app) replaceKubeProxy(ctx context.Context, client *kube.Client) error {
	for {
		report, err := verify.RunServices(ctx, client)
		if err != nil {
			return err
		}
		if report.OK() && !slices.ContainsFunc(report.Nodes, func(n verify.NodeReport) bool { return n.Mode == string(netconf.ProxyOff) }) {
			fmt.Fprintf(a.out, "  %d of %d nodes carry Services\n", len(report.Nodes), len(report.Nodes))
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for every node to carry Services, kube-proxy is still there: %w\n`fathom verify services` shows what is missing", context.Cause(ctx))
		case <-time.After(time.Second):
		}
	}
	err := install.RemoveKubeProxy(ctx, client, func(clean, want int) { fmt.Fprintf(a.out, "  kube-proxy has left %d of %d nodes\n", clean, want) })
	if errors.Is(err, install.ErrNoKubeProxy) {
		fmt.Fprintf(a.out, "Nothing to remove: %v. Turn off another kind of proxy where it is configured.\n", err)
		return nil
	}
	return err
}

// parsePairs parses the values of a repeatable flag.
func parsePairs(flag string, words []string) (map[string]string, error) {
	pairs := map[string]string{}
	for _, w := range words {
		key, value, found := strings.Cut(w, "=")
		if !found {
			return nil, fmt.Errorf("%s %q: want KEY=VALUE", flag, w)
		}
		pairs[key] = value
	}
	return pairs, nil
}

func (a *app) printManifests(o install.Options) error {
	objects, err := install.Objects(o)
	if err != nil {
		return err
	}
	data, err := install.YAML(objects)
	if err != nil {
		return err
	}
	_, err = a.out.Write(data)
	return err
}

func (a *app) uninstall() *cobra.Command {
	var t target
	var force bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove the network from a cluster and restore its nodes' kernels",
		Long: `Makes the agents remove what they wrote to their nodes' kernels, and then deletes what was installed. Pods on the
network would lose it: while there are any, it refuses unless --force is given.

` + targetHelp,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, name, err := a.connect(cmd, t)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("not within %v", timeout))
			defer cancel()
			fmt.Fprintf(a.out, "Removing the network from %s.\n", name)
			err = install.Remove(ctx, client, force, func(clean, want int32) { fmt.Fprintf(a.out, "  %d of %d nodes are clean\n", clean, want) })
			var inUse *install.InUseError
			if errors.As(err, &inUse) {
				return fmt.Errorf("%w\nMove or delete them, or disconnect them with --force", err)
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, "The network is gone. Nodes are NotReady until another one is installed.")
			return nil
		},
	}
	t.register(cmd)
	cmd.Flags().BoolVar(&force, "force", false, "remove the network even if pods use it: they lose it")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait")
	return cmd
}
