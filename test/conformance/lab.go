package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	fathom "github.com/fathom-network/fathom/internal/lab"
)

// ownLab is the name of the lab that a run brings up for itself.
const ownLab = "conformance"

// lab is the lab that is tested, used by its command line as a person would.
type lab struct {
	fathom string // the command
	kit    string
	name   string
	dir    string // for what it leaves to look at
	out    io.Writer
}

// settingOf tells what the first cluster of a lab that is there consists of.
func settingOf(name string) (setting, error) {
	found, err := fathom.Open(fathom.DefaultPaths(), name)
	if err != nil {
		return setting{}, err
	}
	c := found.Clusters[0]
	s := setting{Network: string(c.Network.Kind), Proxy: string(c.Proxy.Kind), Mode: c.Proxy.Mode, Family: string(c.Families[0])}
	if len(c.Families) > 1 {
		s.Family = "dual"
	}
	return s.withDefaults(), nil
}

// up brings a lab up for this run. One that an earlier run could not take down is in the way.
func (l *lab) up(ctx context.Context, s setting, workers int) error {
	names, err := fathom.Names(fathom.DefaultPaths())
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == l.name {
			fmt.Fprintf(l.out, "lab %s is there from a run that did not end well\n", l.name)
			if err := l.run(ctx, "down", "--name", l.name); err != nil {
				return err
			}
		}
	}
	args := []string{"up", "--name", l.name, "--clusters", "1", "--workers", strconv.Itoa(workers),
		"--network", s.Network, "--proxy", s.Proxy, "--ip-family", s.Family}
	if s.Mode != "" {
		args = append(args, "--proxy-mode", s.Mode)
	}
	return l.run(ctx, args...)
}

// down takes the lab down, also after Ctrl-C.
func (l *lab) down(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	return l.run(ctx, "down", "--name", l.name)
}

// run runs a command of fathom. The user's own kubeconfig is not the place for a lab that nobody is to use.
func (l *lab) run(ctx context.Context, args ...string) error {
	cmd := command(ctx, l.fathom, args...)
	cmd.Env = append(os.Environ(), "FATHOM_KIT="+l.kit, "KUBECONFIG="+filepath.Join(l.dir, "kubeconfig.merged"))
	cmd.Stdout, cmd.Stderr = l.out, l.out
	// Up and down leave a state to go on from when they are asked to end; killed, they may not.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("fathom %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

// cluster is the first cluster of a lab.
type cluster struct {
	kubeconfig string     // a file with which this cluster is reached, and no other
	workers    []string   // on which pods are scheduled
	addrs      [][]string // of nodes
}

func (l *lab) cluster(ctx context.Context) (cluster, error) {
	found, err := fathom.Open(fathom.DefaultPaths(), l.name)
	if err != nil {
		return cluster{}, err
	}
	first := &found.Clusters[0]
	c := cluster{kubeconfig: filepath.Join(l.dir, "kubeconfig")}
	for _, n := range first.Workers() {
		c.workers = append(c.workers, n.Name)
	}
	for i := range first.Nodes {
		var addrs []string
		for _, a := range found.NodeAddrs(first, &first.Nodes[i]) {
			addrs = append(addrs, a.String())
		}
		c.addrs = append(c.addrs, addrs)
	}
	return c, l.run(ctx, "kubeconfig", "--name", l.name, "--cluster", first.Name, "--to", c.kubeconfig)
}

// addressPool is for Services of type LoadBalancer: addresses of the nodes' own segment that no node has, of each family.
func addressPool(addrs []string) string {
	var ranges []string
	for _, a := range addrs {
		addr := netip.MustParseAddr(a)
		if addr.Is4() {
			b := addr.As4()
			ranges = append(ranges, fmt.Sprintf("%d.%d.%d.210-%d.%d.%d.250", b[0], b[1], b[2], b[0], b[1], b[2]))
			continue
		}
		p, _ := addr.Prefix(64)
		first := p.Addr().As16()
		first[14] = 0xf0
		ranges = append(ranges, netip.PrefixFrom(netip.AddrFrom16(first), 120).String())
	}
	list, _ := json.Marshal(ranges) // of strings it cannot fail
	return fmt.Sprintf("apiVersion: fathom.network/v1alpha1\nkind: AddressPool\nmetadata: {name: conformance}\nspec: {addresses: %s}\n", list)
}

// give gives the cluster addresses for Services of type LoadBalancer.
func (l *lab) give(ctx context.Context, c cluster) error {
	cmd := command(ctx, filepath.Join(l.kit, "bin", "kubectl"), "--kubeconfig", c.kubeconfig, "apply", "-f", "-")
	cmd.Stdin = strings.NewReader(addressPool(c.addrs[0]))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make an AddressPool: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// spread puts workers into zones, if there are enough of them: some specs want three zones, or three zones of two.
func (l *lab) spread(ctx context.Context, c cluster) error {
	const zones = 3
	if len(c.workers) < zones {
		return nil
	}
	for i, worker := range c.workers {
		cmd := command(ctx, filepath.Join(l.kit, "bin", "kubectl"), "--kubeconfig", c.kubeconfig, "label", "node", worker,
			fmt.Sprintf("topology.kubernetes.io/zone=zone-%c", 'a'+i%zones))
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("put node %s into a zone: %w: %s", worker, err, bytes.TrimSpace(out))
		}
	}
	return nil
}
