package lab

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/lab/image"
	"github.com/fathom-network/fathom/internal/lab/networks"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// assembly is a cluster that is being brought up.
type assembly struct {
	*Lab
	c         *topology.Cluster
	network   networks.Network
	nodes     []node // in the order of the cluster's
	client    *kube.Client
	manifests *manifests
	t         *timeline
	add       addOns
	// controllers is closed when the controllers begin their work.
	controllers chan struct{}
}

// node is a node of the cluster, and the machine that it runs on once it has booted.
type node struct {
	*topology.Node
	*machine.Machine
}

func (l *Lab) assemble(c *topology.Cluster, m *manifests, t *timeline) *assembly {
	a := &assembly{Lab: l, c: c, network: networks.Of(c.Network.Kind), manifests: m, t: t, controllers: make(chan struct{})}
	for i := range c.Nodes {
		a.nodes = append(a.nodes, node{Node: &c.Nodes[i]})
	}
	return a
}

// planes and workers are the nodes of either role: the control-plane nodes come first.
func (a *assembly) planes() []node  { return a.nodes[:len(a.c.ControlPlanes())] }
func (a *assembly) workers() []node { return a.nodes[len(a.c.ControlPlanes()):] }

// What a step may take before it is given up, on a slow and loaded machine.
const (
	apiTimeout  = 4 * time.Minute // kubeadm's own: seconds as a rule, minutes where the machine is busy with something else
	nodeTimeout = 4 * time.Minute
)

func withTimeout(ctx context.Context, d time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d, fmt.Errorf("not within %v", d))
	defer cancel()
	return f(ctx)
}

// step runs f as a step of the cluster.
func (a *assembly) step(name string, f func() error) error { return a.t.step(a.c.Name, name, f) }

// wait runs f as a step that waits for the cluster's objects, no longer than a while.
func (a *assembly) wait(ctx context.Context, name string, within time.Duration, f func(context.Context) error) error {
	return a.step(name, func() error { return a.hint(a.c, withTimeout(ctx, within, f)) })
}

// concurrently runs parts at once. The first error ends the others.
func concurrently(ctx context.Context, parts ...func(context.Context) error) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, part := range parts {
		g.Go(func() error { return part(gctx) })
	}
	return g.Wait()
}

// each runs f for nodes, for no more than a few at once.
func each(ctx context.Context, nodes []node, atOnce int, f func(context.Context, *node) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i := range nodes {
		g.Go(func() error { return f(gctx, &nodes[i]) })
	}
	return g.Wait()
}

// bootLimit bounds how many nodes boot at once: each is a burst of processor time, and more at once than
// there are processors only makes the first ones late.
const bootLimit = 4

// bootNew makes the disk of a node that has none, and boots it.
func (a *assembly) bootNew(ctx context.Context, n *node, store image.Store) (err error) {
	if err := a.writeDisk(a.c, n.Node, store); err != nil {
		return err
	}
	n.Machine, err = a.boot(ctx, a.c, n.Node)
	return err
}

// build makes the cluster from nothing, and leaves a template for those like it if leave is true.
func (a *assembly) build(ctx context.Context, store image.Store, leave bool) error {
	install := func(ctx context.Context, n *node) error { return a.bootNew(ctx, n, store) }
	planes := a.planes()
	err := a.step("boot the control-plane node"+plural(len(planes)), func() error { return each(ctx, planes, bootLimit, install) })
	if err != nil {
		return err
	}
	if err := a.startBalancer(ctx, a.c); err != nil {
		return err
	}
	if err := a.step("kubeadm: certificates and manifests", func() error { return a.initPlanes(ctx) }); err != nil {
		return err
	}
	err = a.step("start kubelet on the control plane", func() error { return each(ctx, planes, len(planes), startNodesKubelet) })
	if err != nil {
		return err
	}
	if a.client, err = kube.Connect(a.diskFile(planes[0].Name, "/etc/kubernetes/super-admin.conf")); err != nil {
		return err
	}
	// The API server takes a second of processor time to start. The workers and the add-ons' manifests are prepared in that time.
	err = concurrently(ctx, a.startAPIServer, a.printAddOns, func(ctx context.Context) error {
		workers := a.workers()
		if len(workers) == 0 {
			return nil
		}
		return a.step(fmt.Sprintf("boot %d worker%s", len(workers), plural(len(workers))), func() error {
			if err := each(ctx, workers, bootLimit, install); err != nil {
				return err
			}
			return a.writeCredentials(workers)
		})
	})
	if err != nil {
		return err
	}
	apply := func(podsBegin <-chan struct{}) { a.manifests.apply(a.c, a.client, podsBegin) }
	if !leave {
		if err := a.join(ctx, apply); err != nil {
			return err
		}
		return a.setBuilt(a.c)
	}
	// A template has no objects of the user's: this once they come after all else.
	if err := a.join(ctx, func(<-chan struct{}) {}); err != nil {
		return err
	}
	if err := a.saveTemplate(ctx); err != nil {
		return err
	}
	apply(nil)
	return a.setBuilt(a.c)
}

// resume brings a cluster that was once built back up: nodes that are off are booted.
func (a *assembly) resume(ctx context.Context) error {
	if err := a.startBalancer(ctx, a.c); err != nil {
		return err
	}
	since := since{}
	for _, n := range a.nodes {
		if _, err := machine.Open(a.cgroup(n.Name)); errors.Is(err, machine.ErrNotRunning) {
			since[n.Name] = time.Now()
		}
	}
	err := a.step("start the nodes", func() error {
		return each(ctx, a.nodes, bootLimit, func(ctx context.Context, n *node) error { return a.startNode(ctx, a.c, n.Node) })
	})
	if err != nil {
		return err
	}
	if a.client, err = kube.Connect(a.AdminKubeconfig(a.c)); err != nil {
		return err
	}
	err = a.step("wait for the API server", func() error { return withTimeout(ctx, apiTimeout, a.client.WaitReady) })
	if err != nil {
		return err
	}
	a.manifests.apply(a.c, a.client, nil)
	if err := a.waitProxy(ctx); err != nil {
		return err
	}
	return a.waitUsable(ctx, since)
}

// initPlanes runs kubeadm's phases up to the static pod manifests on every control-plane node.
func (a *assembly) initPlanes(ctx context.Context) error {
	planes := a.planes()
	for _, n := range planes {
		conf, err := a.kubeadmFile(a.c, n.Node)
		if err != nil {
			return err
		}
		if err := writeFile(n.File(kubeadmConfig), conf, 0o600); err != nil {
			return err
		}
	}
	first, others := planes[0], planes[1:]
	if err := kubeadm(ctx, first.Machine, phasesBefore); err != nil {
		return err
	}
	err := each(ctx, others, max(len(others), 1), func(ctx context.Context, n *node) error {
		if err := a.sharePKI(first.Name, n.Name, n.Machine); err != nil {
			return err
		}
		return kubeadm(ctx, n.Machine, phasesBefore)
	})
	if err != nil {
		return err
	}
	for _, n := range planes {
		if err := hold(n.Machine); err != nil {
			return err
		}
	}
	return a.writeCredentials(planes)
}

// writeCredentials gives running nodes the files that their kubelets need to be known by.
func (a *assembly) writeCredentials(nodes []node) error {
	authority, err := a.authority(a.c)
	if err != nil {
		return err
	}
	for _, n := range nodes {
		files, err := a.credentials(a.c, n.Node, authority)
		if err != nil {
			return err
		}
		for path, data := range files {
			if err := writeFile(n.File(path), data, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

func startNodesKubelet(ctx context.Context, n *node) error { return startKubelet(ctx, n.Machine) }

// startAPIServer waits for it, and lets the static pods run that need one.
func (a *assembly) startAPIServer(ctx context.Context) error {
	return a.step("start the API server", func() error {
		if err := withTimeout(ctx, apiTimeout, a.client.WaitServing); err != nil {
			return a.planeHint(a.c, err)
		}
		for _, n := range a.planes() {
			if err := release(n.Machine); err != nil {
				return err
			}
		}
		return nil
	})
}

// join creates the Nodes in an API server that has only begun to serve. Then it starts their kubelets, and at the same time
// installs the network and the add-ons. It calls apply as soon as objects can be made, with what is closed when pods can.
func (a *assembly) join(ctx context.Context, apply func(podsBegin <-chan struct{})) error {
	podsBegin := make(chan struct{})
	apply(podsBegin)
	// Nodes are made before their kubelets register, so that each has the pod CIDR that its routes and its
	// network configuration were written for, instead of the next one in the order of registration.
	for _, n := range a.nodes {
		if err := setNode(ctx, a.client, a.nodeObject(a.c, n.Node)); err != nil {
			return err
		}
	}
	err := concurrently(ctx, a.startWorkers, a.createAccounts, a.waitRoles, a.installNetwork, func(ctx context.Context) error {
		return a.installAddOns(ctx, func() { close(podsBegin) })
	})
	if err != nil {
		return err
	}
	// What `kubeadm join`, `kubeadm upgrade` and a person look for, and no pod: it is written while CoreDNS's pods wait for
	// their volumes.
	return concurrently(ctx, a.uploadConfig, a.waitProxy, func(ctx context.Context) error { return a.waitUsable(ctx, nil) })
}

func (a *assembly) startWorkers(ctx context.Context) error {
	return a.step("start kubelet on the workers", func() error { return each(ctx, a.workers(), bootLimit, startNodesKubelet) })
}

func (a *assembly) createAccounts(ctx context.Context) error {
	return a.wait(ctx, "the controllers' accounts", apiTimeout, func(ctx context.Context) error { return createAccounts(ctx, a.client) })
}

// waitRoles waits for the roles that the controllers need, and so for the moment from which they work.
func (a *assembly) waitRoles(ctx context.Context) error {
	defer close(a.controllers)
	return a.step("the API server's roles", func() error {
		return a.planeHint(a.c, withTimeout(ctx, apiTimeout, a.client.WaitReady))
	})
}

func (a *assembly) installNetwork(ctx context.Context) error {
	if a.network.Step() == "" {
		return nil
	}
	return a.wait(ctx, a.network.Step(), apiTimeout, func(ctx context.Context) error {
		return a.network.Install(ctx, a.networkOf(a.c), a.client, a.controllers)
	})
}

// networkOf is what a network is told of a cluster.
func (l *Lab) networkOf(c *topology.Cluster) networks.Cluster {
	return networks.Cluster{Cluster: c, Lab: &l.Lab, Kit: l.Kit, API: netip.AddrPortFrom(l.APIAddr(c), apiPort), CA: l.diskFile(c.Nodes[0].Name, clusterCA)}
}

func (a *assembly) uploadConfig(ctx context.Context) error {
	return a.step("kubeadm: configuration and roles", func() error {
		return kubeadm(ctx, a.nodes[0].Machine, []string{"upload-config", "bootstrap-token"})
	})
}

// installAddOns creates kube-proxy and CoreDNS, or what of them a template does not have. CoreDNS's pods wait for kube-proxy to run on every node: one that
// starts much before its node has rules for Services loses a second and more in reaching the API server. They
// take longer to start than kube-proxy then takes to write its rules. It calls podsBegin when other pods can be made.
func (a *assembly) installAddOns(ctx context.Context, podsBegin func()) error {
	return a.hint(a.c, withTimeout(ctx, nodeTimeout, func(ctx context.Context) error {
		if len(a.add.proxy) > 0 {
			if err := a.step("create kube-proxy", func() error { return a.client.Create(ctx, a.add.proxy) }); err != nil {
				return err
			}
		}
		if len(a.add.base) > 0 {
			if err := a.client.Create(ctx, a.add.base); err != nil {
				return err
			}
		}
		if a.proxied() {
			err := a.step("kube-proxy runs", func() error {
				return waitPods(ctx, a.client, "kube-system", "k8s-app=kube-proxy", len(a.nodes), nil)
			})
			if err != nil {
				return err
			}
		}
		if a.proxied() || a.c.Proxy.Kind == topology.ProxyFathom {
			// Fathom's agent has a node become Ready when it carries the node's Services.
			// The scheduler would put both of CoreDNS's pods on the first node that is Ready, for good.
			if err := a.waitSome(ctx); err != nil {
				return err
			}
		}
		podsBegin()
		return a.step("create CoreDNS", func() error { return a.client.Create(ctx, a.add.dns) })
	}))
}

// waitSome waits until there is a choice of nodes for pods.
func (a *assembly) waitSome(ctx context.Context) error {
	hosts := names(a.workers())
	if len(hosts) == 0 {
		hosts = names(a.nodes)
	}
	some := min(len(hosts), 2)
	return a.step(fmt.Sprintf("%d node%s Ready for pods", some, plural(some)), func() error {
		return waitNodes(ctx, a.client, hosts, some, nil)
	})
}

func names(nodes []node) []string {
	var all []string
	for _, n := range nodes {
		all = append(all, n.Name)
	}
	return all
}

// proxied says whether the cluster gets a kube-proxy that can be waited for: there is a network to wait for, too.
func (a *assembly) proxied() bool {
	return a.c.Proxy.Kind == topology.ProxyKubeProxy && a.network.Ready()
}

// proxyHealth is where kube-proxy says whether its rules are up to date.
const proxyHealth = 10256

// waitProxy asks each node's kube-proxy itself: it answers as soon as its rules are in place, half a second
// before kubelet has told the API server that the pod is ready, and a process that ended with its node does
// not answer at all.
func (a *assembly) waitProxy(ctx context.Context) error {
	if !a.proxied() {
		return nil
	}
	return a.wait(ctx, "kube-proxy answers on every node", nodeTimeout, func(ctx context.Context) error {
		return each(ctx, a.nodes, len(a.nodes), func(ctx context.Context, n *node) error {
			url := "http://" + netip.AddrPortFrom(a.NodeAddrs(a.c, n.Node)[0], proxyHealth).String() + "/healthz"
			if err := kube.WaitHealthy(ctx, &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}, url); err != nil {
				return fmt.Errorf("wait for kube-proxy on node %s: %w", n.Name, err)
			}
			return nil
		})
	})
}

// waitUsable returns when the nodes and CoreDNS are Ready. Without a network there is nothing to wait for: nodes stay NotReady
// until the user installs one.
func (a *assembly) waitUsable(ctx context.Context, since since) error {
	if !a.network.Ready() {
		return nil
	}
	all := names(a.nodes)
	err := a.wait(ctx, fmt.Sprintf("%d node%s Ready", len(all), plural(len(all))), nodeTimeout, func(ctx context.Context) error {
		return waitNodes(ctx, a.client, all, len(all), since)
	})
	if err != nil {
		return err
	}
	// Without a Service proxy CoreDNS does not reach the API server by its Service, and is never ready.
	if a.c.Proxy.Kind == topology.ProxyNone {
		return nil
	}
	return a.wait(ctx, "CoreDNS answers", nodeTimeout, func(ctx context.Context) error {
		hasten, stop := context.WithCancel(ctx)
		var hastening sync.WaitGroup
		hastening.Go(func() { hastenReady(hasten, a.client, "kube-system", "k8s-app=kube-dns", "8181", "ready") })
		defer hastening.Wait()
		defer stop()
		return waitPods(ctx, a.client, "kube-system", "k8s-app=kube-dns", 1, since)
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

func plural(n int) string {
	if n == 1 {
		return ""
	}
	return "s"
}
