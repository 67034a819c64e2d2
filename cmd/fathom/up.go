package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/manifest"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab"
	"github.com/fathom-network/fathom/internal/lab/networks"
)

func (a *app) up() *cobra.Command {
	var file, clusters, from string
	var workers, planes int
	var fresh, hostPaths bool
	var timings timings
	var o topology.Overrides
	cmd := &cobra.Command{
		Use:   "up [-f LAB.YAML]",
		Short: "Bring a lab up",
		Long: `Brings a lab up and returns when its nodes are Ready and names resolve in it.

Without a file: clusters east and west, one control-plane node and two workers each. An existing lab is brought
back to its state: nodes that are off are started, and a cluster that an interrupted run left unfinished is
recreated. Flags override the file. docs/lab-file.md describes the file.

--from begins with what fathom save has saved: a file, LAB@TIME of those that are kept here, or @-5m for the last that is
at least five minutes old. docs/save.md says more.

Manifests, from the file and from --manifest, are applied while the clusters start, and again by each up that
names them. It does not wait for their pods.`,
		Example: `  fathom up
  fathom up --clusters 1 --workers 3
  fathom up --name net --clusters a,b --network flannel --proxy-mode iptables
  fathom up --clusters 1 --manifest app.yaml
  helm template app ./chart | fathom up --manifest -
  fathom up -f lab.yaml
  fathom up --from lab.tar.zst --name try`,
		Args:    cobra.NoArgs,
		PreRunE: requireRoot,
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "lab `file`; - reads standard input")
	f.StringVar(&clusters, "clusters", "", "how many clusters, or their names separated by commas")
	f.IntVar(&workers, "workers", 0, "workers of each cluster")
	f.IntVar(&planes, "control-planes", 0, "control-plane nodes of each cluster: 1, 3, 5 or 7")
	f.StringVar(&o.Network, "network", "", "pod network: fathom, bridge, flannel or none")
	f.StringVar(&o.Proxy, "proxy", "", "Service proxy: fathom, kube-proxy or none")
	f.StringVar(&o.ProxyMode, "proxy-mode", "", "mode of the proxy: auto or nftables (fathom), nftables, iptables or ipvs (kube-proxy)")
	f.StringVar(&o.DNS, "dns", "", "what answers pods' DNS queries: cluster (CoreDNS's pods) or node-cache (a cache on the pod's node)")
	f.StringVar(&o.IPFamily, "ip-family", "", "ipv4, ipv6 or dual")
	f.StringVar(&o.PodCIDR, "pod-cidr", "", "addresses of pods")
	f.StringVar(&o.ServiceCIDR, "service-cidr", "", "addresses of Services")
	f.StringVar(&o.Underlay, "underlay", "", "addresses of nodes: an IPv4 /16, an IPv6 /48, or both, separated by a comma")
	f.StringArrayVar(&o.Manifests, "manifest", nil, "`file` of objects for every cluster, a directory of such files, a kustomization, or -; may be repeated")
	f.StringVar(&from, "from", "", "begin with what was saved: a `file`, LAB@TIME, or @-5m (see fathom save)")
	f.BoolVar(&hostPaths, "host-paths", false, "with --from: let nodes see the paths of this machine that the file names")
	f.BoolVar(&fresh, "fresh", false, "build each cluster step by step, and neither use nor leave a template")
	timings.flag(f)
	complete := func(flag string, values ...string) {
		_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	complete("network", "fathom", "bridge", "flannel", "none")
	complete("proxy", "fathom", "kube-proxy", "none")
	complete("proxy-mode", "auto", "iptables", "nftables", "ipvs")
	complete("dns", "cluster", "node-cache")
	complete("ip-family", "ipv4", "ipv6", "dual")

	shape := []string{"clusters", "workers", "control-planes", "network", "proxy", "proxy-mode", "dns", "ip-family", "pod-cidr", "service-cidr"}
	for _, name := range append([]string{"file", "fresh", "manifest"}, shape...) {
		cmd.MarkFlagsMutuallyExclusive("from", name)
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if from != "" {
			s, err := a.findFrom(from)
			if err != nil {
				return err
			}
			v4, v6, err := topology.ParseUnderlay(o.Underlay)
			if err != nil {
				return err
			}
			o := lab.RestoreOptions{Name: s.Lab.Name, Underlay4: v4, Underlay6: v6, HostPaths: hostPaths}
			if cmd.Flags().Changed("name") {
				o.Name = a.name
			}
			return a.bringUp(cmd.Context(), o.Name, "", timings, func(ctx context.Context, report lab.Report) (*lab.Lab, error) {
				return a.upFrom(ctx, s, o, report)
			})
		}
		if hostPaths {
			return errors.New("--host-paths is of --from: a lab file says itself what nodes see")
		}
		asked := file != "" || f.Changed("underlay")
		for _, name := range shape {
			asked = asked || f.Changed(name)
		}
		if f.Changed("workers") {
			o.Workers = &workers
		}
		if f.Changed("control-planes") {
			o.ControlPlanes = &planes
		}
		if f.Changed("clusters") {
			var err error
			if o.Clusters, err = topology.ParseClusters(clusters); err != nil {
				return err
			}
		}
		if file == "" || cmd.Flags().Changed("name") {
			o.Name = a.name
		}
		want, err := a.describe(cmd.Context(), file, o)
		if err != nil {
			return err
		}
		if !asked { // no flags: the existing lab is meant
			if have, err := lab.Open(a.paths, want.Name); err == nil {
				for i := range have.Clusters {
					have.Clusters[i].Manifests = want.Clusters[0].Manifests // the flag's
				}
				want = &have.Lab
			}
		}
		again := ""
		if hasManifests(want) {
			again = "the same command"
		}
		return a.bringUp(cmd.Context(), want.Name, again, timings, func(ctx context.Context, report lab.Report) (*lab.Lab, error) {
			return lab.Up(ctx, a.paths, want, fresh, report)
		})
	}
	return cmd
}

// bringUp shows how a lab comes up, and says what to do next: again is what continues where it was interrupted, if not a plain up.
func (a *app) bringUp(ctx context.Context, name, again string, timings timings, up func(context.Context, lab.Report) (*lab.Lab, error)) error {
	costs, end, err := timings.costs(name)
	if err != nil {
		return err
	}
	defer end()
	start := time.Now()
	progress := newProgress(a.err)
	l, err := up(ctx, progress.report)
	progress.close()
	if timings != timingsOff {
		progress.timeline(a.err)
		err = errors.Join(err, costs(a.err))
	}
	if err != nil {
		if ctx.Err() != nil {
			if again == "" {
				again = "`fathom up" + nameFlag(name) + "`"
			}
			fmt.Fprintf(a.err, "Interrupted: %s continues, `fathom down%s` removes the lab.\n", again, nameFlag(name))
		}
		return err
	}
	a.summary(l, time.Since(start))
	return nil
}

// describe returns the lab that the file and the flags describe.
func (a *app) describe(ctx context.Context, file string, o topology.Overrides) (*topology.Lab, error) {
	if file == topology.Stdin && slices.Contains(o.Manifests, topology.Stdin) {
		return nil, errors.New("standard input is either the lab file or a manifest: put one of them into a file")
	}
	want, err := a.parseLab(ctx, file, o)
	if err != nil {
		return nil, err
	}
	if err := want.CheckHostPaths(readable); err != nil {
		return nil, err
	}
	err = want.ReadManifests(func(path string) ([]manifest.File, error) { return a.manifestFiles(ctx, path) })
	if err != nil {
		return nil, err
	}
	return want, nil
}

func (a *app) parseLab(ctx context.Context, file string, o topology.Overrides) (*topology.Lab, error) {
	if file == "" {
		return topology.Default(o)
	}
	const most, what = 1 << 20, "lab file"
	var data []byte
	var err error
	if file == topology.Stdin {
		file = "standard input" // its relative paths start here
		data, err = a.readStdin(ctx, most, what)
	} else {
		data, err = readBounded(file, most, what)
	}
	if err != nil {
		return nil, fmt.Errorf("read the lab file: %w", err)
	}
	if o.Dir, err = filepath.Abs(filepath.Dir(file)); err != nil {
		return nil, fmt.Errorf("find the lab file's directory: %w", err)
	}
	return topology.Parse(data, file, o)
}

// readable checks that a path of the host can be given to nodes. It opens nothing: a pipe would block.
func readable(path string) error {
	if err := unix.Access(path, unix.R_OK); err != nil {
		return fmt.Errorf("nodes need it, but it is not accessible: %w", err)
	}
	return nil
}

// readBounded reads a file of at most limit bytes.
func readBounded(path string, limit int64, what string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes: it is not a %s", path, limit, what)
	}
	return data, nil
}

func hasManifests(l *topology.Lab) bool {
	return slices.ContainsFunc(l.Clusters, func(c topology.Cluster) bool { return len(c.Manifests) > 0 })
}

func nameFlag(name string) string {
	if name == "fathom" {
		return ""
	}
	return " --name " + name
}

func (a *app) summary(l *lab.Lab, took time.Duration) {
	nodes := 0
	for _, c := range l.Clusters {
		nodes += len(c.Nodes)
	}
	fmt.Fprintf(a.out, "\nLab %s is up: %s, %s, in %.1f s.\n\n", l.Name, count(len(l.Clusters), "cluster"), count(nodes, "node"), took.Seconds())
	for i := range l.Clusters {
		c := &l.Clusters[i]
		fmt.Fprintf(a.out, "  %-12s %s, API https://%s:6443, pods %s, context %s\n", c.Name, count(len(c.Nodes), "node"), l.APIAddr(c), c.PodCIDRs[0], l.Context(c))
	}
	if hasManifests(&l.Lab) {
		fmt.Fprintf(a.out, "\nThe manifests are applied. Their pods may still be starting.\n")
	}
	self := commandName()
	fmt.Fprintf(a.out, "\nTry next:\n  %s kubectl%s --cluster %s -- get nodes -o wide\n  %s node shell%s %s\n",
		self, nameFlag(l.Name), l.Clusters[0].Name, self, nameFlag(l.Name), l.Clusters[0].Nodes[len(l.Clusters[0].Nodes)-1].Name)
	for _, c := range l.Clusters {
		if !networks.Of(c.Network.Kind).Ready() {
			fmt.Fprintf(a.out, "\nCluster %s has no pod network: its nodes are NotReady until a conflist is in /etc/cni/net.d.\nSee docs/networks.md for how to bring your own.\n", c.Name)
		}
	}
}

// commandName returns what the user has to type to run this program.
func commandName() string {
	exe, err := os.Executable()
	if err != nil {
		return "fathom"
	}
	if path, err := exec.LookPath("fathom"); err == nil {
		if found, err := filepath.EvalSymlinks(path); err == nil && found == exe {
			return "fathom"
		}
	}
	return os.Args[0]
}

func count(n int, what string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, what)
	}
	return fmt.Sprintf("%d %ss", n, what)
}
