package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"text/template"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/install"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// initPlanes runs kubeadm's phases up to the static pod manifests on every control-plane node.
func (l *Lab) initPlanes(ctx context.Context, c *topology.Cluster, machines []*machine.Machine) error {
	planes := c.ControlPlanes()
	for i := range planes {
		conf, err := l.kubeadmFile(c, &planes[i])
		if err != nil {
			return err
		}
		if err := writeFile(machines[i].File(kubeadmConfig), conf, 0o600); err != nil {
			return err
		}
	}
	if err := kubeadm(ctx, machines[0], phasesBefore); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	for i := range planes[1:] {
		m := machines[i+1]
		g.Go(func() error {
			if err := l.sharePKI(planes[0].Name, planes[i+1].Name, m); err != nil {
				return err
			}
			return kubeadm(gctx, m, phasesBefore)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range planes {
		if err := hold(machines[i]); err != nil {
			return err
		}
	}
	return l.writeCredentials(c, planes, machines)
}

// writeCredentials gives running nodes the files that their kubelets need to be known by.
func (l *Lab) writeCredentials(c *topology.Cluster, nodes []topology.Node, machines []*machine.Machine) error {
	a, err := l.authority(c)
	if err != nil {
		return err
	}
	for i := range nodes {
		n := &nodes[i]
		files, err := l.credentials(c, n, a)
		if err != nil {
			return err
		}
		for path, data := range files {
			if err := writeFile(machines[n.Index].File(path), data, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *Lab) startPlanes(ctx context.Context, c *topology.Cluster, machines []*machine.Machine) error {
	g, gctx := errgroup.WithContext(ctx)
	for i := range c.ControlPlanes() {
		g.Go(func() error { return startKubelet(gctx, machines[i]) })
	}
	return g.Wait()
}

// join makes the nodes known to an API server that has only begun to serve, starts their kubelets, and installs the add-ons
// and the network meanwhile. It calls nodesReady when pods can be made.
func (l *Lab) join(ctx context.Context, c *topology.Cluster, client *kube.Client, machines []*machine.Machine, add addOns, nodesReady func(), t *timeline) error {
	// Nodes are made before their kubelets register, so that each has the pod CIDR that its routes and its
	// network configuration were written for, instead of the next one in the order of registration.
	for i := range c.Nodes {
		if err := setNode(ctx, client, l.nodeObject(c, &c.Nodes[i])); err != nil {
			return err
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return t.step(c.Name, "start kubelet on the workers", func() error {
			g, gctx := errgroup.WithContext(gctx)
			g.SetLimit(bootLimit)
			for _, w := range c.Workers() {
				g.Go(func() error { return startKubelet(gctx, machines[w.Index]) })
			}
			return g.Wait()
		})
	})
	g.Go(func() error {
		return t.step(c.Name, "the controllers' accounts", func() error {
			return l.hint(c, withTimeout(gctx, apiTimeout, func(ctx context.Context) error { return createAccounts(ctx, client) }))
		})
	})
	idle, controllersBegin := context.WithCancel(gctx)
	defer controllersBegin()
	g.Go(func() error {
		err := t.step(c.Name, "the API server's roles", func() error {
			return l.planeHint(c, withTimeout(gctx, apiTimeout, client.WaitReady))
		})
		controllersBegin()
		return err
	})
	switch c.Network.Kind {
	case topology.NetworkFathom:
		g.Go(func() error {
			return t.step(c.Name, "install the network", func() error {
				return l.hint(c, withTimeout(gctx, apiTimeout, func(ctx context.Context) error {
					err := kube.WhenStarted(ctx, func() error { return install.Apply(ctx, client, l.installOptions(c)) })
					if err != nil {
						return err
					}
					return l.createAgents(idle, c, client)
				}))
			})
		})
	case topology.NetworkFlannel:
		g.Go(func() error {
			return t.step(c.Name, "create flannel", func() error { return l.createFlannel(gctx, c, client) })
		})
	}
	g.Go(func() error { return l.installAddOns(gctx, c, client, add, nodesReady, t) })
	if err := g.Wait(); err != nil {
		return err
	}
	// What `kubeadm join`, `kubeadm upgrade` and a person look for, and no pod: it is written while CoreDNS's pods wait for
	// their volumes.
	g, gctx = errgroup.WithContext(ctx)
	g.Go(func() error {
		return t.step(c.Name, "kubeadm: configuration and roles", func() error {
			return kubeadm(gctx, machines[0], []string{"upload-config", "bootstrap-token"})
		})
	})
	if l.proxied(c) {
		g.Go(func() error { return l.waitProxy(gctx, c, t) })
	}
	g.Go(func() error { return l.waitUsable(gctx, c, client, names(c.Nodes), nil, t) })
	return g.Wait()
}

// installAddOns creates kube-proxy and CoreDNS. CoreDNS's pods wait for kube-proxy to run on every node: one that
// starts much before its node has rules for Services loses a second and more in reaching the API server. They
// take longer to start than kube-proxy then takes to write its rules.
func (l *Lab) installAddOns(ctx context.Context, c *topology.Cluster, client *kube.Client, add addOns, nodesReady func(), t *timeline) error {
	return l.hint(c, withTimeout(ctx, nodeTimeout, func(ctx context.Context) error {
		if len(add.proxy) > 0 {
			if err := t.step(c.Name, "create kube-proxy", func() error { return client.Create(ctx, add.proxy) }); err != nil {
				return err
			}
		}
		if err := client.Create(ctx, add.base); err != nil {
			return err
		}
		if l.proxied(c) {
			err := t.step(c.Name, "kube-proxy runs", func() error {
				return waitPods(ctx, client, "kube-system", "k8s-app=kube-proxy", len(c.Nodes), nil)
			})
			if err != nil {
				return err
			}
		}
		if l.proxied(c) || c.Proxy.Kind == topology.ProxyFathom {
			// Fathom's agent has a node become Ready when it carries the node's Services.
			//
			// The scheduler would put both of CoreDNS's pods on the first node that is Ready, for good.
			hosts := names(c.Workers())
			if len(hosts) == 0 {
				hosts = names(c.Nodes)
			}
			some := min(len(hosts), 2)
			err := t.step(c.Name, fmt.Sprintf("%d node%s for CoreDNS Ready", some, plural(some)), func() error {
				return waitNodes(ctx, client, hosts, some, nil)
			})
			if err != nil {
				return err
			}
		}
		nodesReady()
		return t.step(c.Name, "create CoreDNS", func() error { return client.Create(ctx, add.dns) })
	}))
}

func names(nodes []topology.Node) []string {
	var all []string
	for _, n := range nodes {
		all = append(all, n.Name)
	}
	return all
}

// proxied says whether the cluster gets a kube-proxy that can be waited for: there is a network to wait for, too.
func (l *Lab) proxied(c *topology.Cluster) bool {
	return c.Proxy.Kind == topology.ProxyKubeProxy && c.Network.Kind != topology.NetworkNone
}

// proxyHealth is where kube-proxy says whether its rules are up to date.
const proxyHealth = 10256

// waitProxy asks each node's kube-proxy itself: it answers as soon as its rules are in place, half a second
// before kubelet has told the API server that the pod is ready, and a process that ended with its node does
// not answer at all.
func (l *Lab) waitProxy(ctx context.Context, c *topology.Cluster, t *timeline) error {
	return t.step(c.Name, "kube-proxy answers on every node", func() error {
		return l.hint(c, withTimeout(ctx, nodeTimeout, func(ctx context.Context) error {
			g, gctx := errgroup.WithContext(ctx)
			for i := range c.Nodes {
				n := &c.Nodes[i]
				url := "http://" + netip.AddrPortFrom(l.NodeAddrs(c, n)[0], proxyHealth).String() + "/healthz"
				g.Go(func() error {
					if err := kube.WaitHealthy(gctx, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, url); err != nil {
						return fmt.Errorf("wait for kube-proxy on node %s: %w", n.Name, err)
					}
					return nil
				})
			}
			return g.Wait()
		}))
	})
}

// planeHint adds where to look to an error of the first control-plane node.
func (l *Lab) planeHint(c *topology.Cluster, err error) error {
	if err == nil {
		return nil
	}
	node := c.Nodes[0].Name
	return fmt.Errorf("%w\nsee `fathom node logs --name %s %s kubelet` and `fathom node ps --name %s %s`", err, l.Name, node, l.Name, node)
}

// hint adds where to look to an error about a cluster's objects.
func (l *Lab) hint(c *topology.Cluster, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w\nsee `fathom kubectl --name %s --cluster %s -- get nodes,pods -A`", err, l.Name, c.Name)
}

// waitUsable returns when the nodes are Ready and CoreDNS is, on top of kube-proxy. Without a network there is nothing to
// wait for: nodes stay NotReady until somebody brings one.
func (l *Lab) waitUsable(ctx context.Context, c *topology.Cluster, client *kube.Client, names []string, since since, t *timeline) error {
	if c.Network.Kind == topology.NetworkNone {
		return nil
	}
	err := t.step(c.Name, fmt.Sprintf("%d node%s Ready", len(names), plural(len(names))), func() error {
		return l.hint(c, withTimeout(ctx, nodeTimeout, func(ctx context.Context) error { return waitNodes(ctx, client, names, len(names), since) }))
	})
	if err != nil {
		return err
	}
	// Without a Service proxy CoreDNS does not reach the API server by its Service, and is never ready.
	if c.Proxy.Kind == topology.ProxyNone {
		return nil
	}
	return t.step(c.Name, "CoreDNS answers", func() error {
		return l.hint(c, withTimeout(ctx, nodeTimeout, func(ctx context.Context) error {
			hasten, stop := context.WithCancel(ctx)
			var hastening sync.WaitGroup
			hastening.Go(func() { hastenReady(hasten, client, "kube-system", "k8s-app=kube-dns", "8181", "ready") })
			defer hastening.Wait()
			defer stop()
			return waitPods(ctx, client, "kube-system", "k8s-app=kube-dns", 1, since)
		}))
	})
}

// createAgents makes the agents' pods until ctx ends.
func (l *Lab) createAgents(ctx context.Context, c *topology.Cluster, client *kube.Client) error {
	ca, err := os.ReadFile(l.diskFile(c.Nodes[0].Name, clusterCA))
	if err != nil {
		return err
	}
	if err := install.CreatePods(ctx, client, names(c.Nodes), string(ca)); ctx.Err() == nil {
		return err
	}
	return nil // the DaemonSet controller makes those that are not there
}

// installOptions are what `fathom install` would be told for this cluster.
func (l *Lab) installOptions(c *topology.Cluster) install.Options {
	return install.Options{
		APIServer: netip.AddrPortFrom(l.APIAddr(c), apiPort).String(),
		Config: map[string]string{"mode": c.Network.Mode, "vni": strconv.Itoa(c.Network.VNI), "port": strconv.Itoa(c.Network.Port),
			"serviceProxy": serviceProxy(c.Proxy), "dns": dnsSetting(c.DNS)},
	}
}

func serviceProxy(p topology.Proxy) string {
	if p.Kind != topology.ProxyFathom {
		return string(netconf.ProxyOff)
	}
	return p.Mode
}

// dnsSetting is the setting of a cluster, or of one that was described before there was a choice.
func dnsSetting(d topology.DNS) string {
	if d == "" {
		d = topology.DNSCluster
	}
	return string(d)
}

//go:embed flannel.yaml
var flannelManifest string

// createFlannel creates flannel's own manifest, with this cluster's ranges.
func (l *Lab) createFlannel(ctx context.Context, c *topology.Cluster, client *kube.Client) error {
	values := map[string]any{
		"Version": l.Kit.Flannel, "CNIVersion": l.Kit.FlannelCNI, "VNI": c.Network.VNI, "Port": c.Network.Port,
		"NFTables": true,
	}
	for i, f := range c.Families {
		values[map[topology.Family]string{topology.IPv4: "IPv4", topology.IPv6: "IPv6"}[f]] = c.PodCIDRs[i].String()
	}
	tmpl, err := template.New("flannel").Option("missingkey=zero").Parse(flannelManifest)
	if err != nil {
		return err
	}
	var manifest bytes.Buffer
	if err := tmpl.Execute(&manifest, values); err != nil {
		return err
	}
	return withTimeout(ctx, apiTimeout, func(ctx context.Context) error { return client.Create(ctx, manifest.Bytes()) })
}

// NodeState is what a node is found to be.
type NodeState struct {
	Name      string   `json:"name"`
	Cluster   string   `json:"cluster"`
	Role      string   `json:"role"`
	State     string   `json:"state"` // running or off
	Pid       int      `json:"pid,omitempty"`
	Addresses []string `json:"addresses"`
	PodCIDRs  []string `json:"podCIDRs"`
}

// Nodes returns the state of the nodes of a cluster, or of all clusters if the name is empty.
func (l *Lab) Nodes(cluster string) ([]NodeState, error) {
	var all []NodeState
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if cluster != "" && c.Name != cluster {
			continue
		}
		for j := range c.Nodes {
			n := &c.Nodes[j]
			s := NodeState{Name: n.Name, Cluster: c.Name, Role: string(n.Role), State: "off"}
			for _, a := range l.NodeAddrs(c, n) {
				s.Addresses = append(s.Addresses, a.String())
			}
			for _, p := range n.PodCIDRs {
				s.PodCIDRs = append(s.PodCIDRs, p.String())
			}
			m, err := machine.Open(l.cgroup(n.Name))
			if err == nil {
				s.State, s.Pid = "running", m.Pid
			} else if !errors.Is(err, machine.ErrNotRunning) {
				return nil, err
			}
			all = append(all, s)
		}
	}
	if all == nil {
		_, err := l.Cluster(cluster)
		return nil, err
	}
	return all, nil
}

// startNode boots a node that has a disk, and its kubelet.
func (l *Lab) startNode(ctx context.Context, c *topology.Cluster, n *topology.Node) error {
	m, err := l.boot(ctx, c, n)
	if err != nil {
		return err
	}
	return startKubelet(ctx, m)
}

// StartNode boots a node that is off.
func (l *Lab) StartNode(ctx context.Context, name string) error {
	return l.change(name, func(c *topology.Cluster, n *topology.Node) error {
		if !l.built(c) {
			return fmt.Errorf("start node %s: %w; bring it up with `fathom up --name %s`", name, errNoBuild, l.Name)
		}
		return l.startNode(ctx, c, n)
	})
}

// StopNode shuts a node down: its processes are asked to end first.
func (l *Lab) StopNode(ctx context.Context, name string) error {
	return l.change(name, func(*topology.Cluster, *topology.Node) error {
		m, err := l.Machine(name)
		if errors.Is(err, machine.ErrNotRunning) {
			return nil
		}
		if err != nil {
			return err
		}
		return m.PowerOff(ctx)
	})
}

// KillNode cuts a node's power.
func (l *Lab) KillNode(ctx context.Context, name string) error {
	return l.change(name, func(*topology.Cluster, *topology.Node) error {
		// Its link first: the kernel ends the connections of processes that are killed, and a machine without power
		// says no such last word. Routers take it for a restart.
		if err := l.CutWire(name); err != nil && !errors.Is(err, machine.ErrNotRunning) {
			return err
		}
		return machine.Kill(ctx, l.cgroup(name))
	})
}

// change runs f for a node while no other command changes the lab.
func (l *Lab) change(node string, f func(*topology.Cluster, *topology.Node) error) error {
	c, n, err := l.Node(node)
	if err != nil {
		return err
	}
	unlock, err := lock(l.Paths, l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	return f(c, n)
}
