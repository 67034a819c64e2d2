package agent

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/agent/proxy"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// proxyPaths returns the proxy's paths of a node with these.
func proxyPaths(p Paths) proxy.Paths {
	return proxy.Paths{BPF: filepath.Join(p.BPF, "services"), Cgroup: p.Cgroup, NetNS: p.NetNS}
}

func (a *Agent) newProxy() *proxy.Proxy {
	p := proxy.New(proxy.Options{
		Client: a.Client, Log: a.Log, Paths: proxyPaths(a.Paths), Resync: a.Resync, Loopback: loopback{a.settings},
		Changed: func() {
			a.Wake()
			a.lb.Wake()
		},
	})
	a.metrics.registry.MustRegister(p)
	return p
}

// refuseUnserved has the kernel reject what goes to Services' addresses that no Service serves. It does so once the node carries
// Services, and stops when it no longer does.
func (a *Agent) refuseUnserved(_ context.Context, p *pass) outcome {
	return problem(a.setUnserved(p.facts.Own, p.pools))
}

func (a *Agent) setUnserved(own podnet.Node, pools vip.Pools) error {
	if a.config.ServiceProxy == netconf.ProxyOff {
		if a.refusesNothing { // another transaction would have all tables read again
			return nil
		}
		err := a.rules.Delete(service.UnservedTable)
		a.refusesNothing = err == nil
		return err
	}
	a.refusesNothing = false
	balancers, known := a.proxy.LoadBalancers()
	if !known {
		return nil // Services are not known yet: the present rules stay
	}
	count, err := a.rules.SetUnserved(vip.Unserved(vip.ServiceRanges(a.view.ServiceCIDRs.All()), pools, balancers, a.config.ExternalIPsFor, a.proxy.Others(), own.Addrs))
	if err != nil {
		return fmt.Errorf("what is for no Service is not refused: %w", err)
	}
	if total := count.Added + count.Removed + count.Corrected; total > 0 {
		a.Log.Info("changed what is refused of Services' addresses", "elements", total)
	}
	return nil
}

// poolsOfServices are the AddressPools, and what they may not overlap.
func (a *Agent) poolsOfServices() vip.Objects {
	return vip.Objects{Pools: a.view.AddressPools.All(), Nodes: a.view.Nodes.All(), Services: a.view.ServiceCIDRs.All(), PodPools: a.view.Pools.All()}
}

// servicesState reads what the node's kernel does with Services.
func (a *Agent) servicesState(ctx context.Context) (answer.Services, error) {
	s, err := a.proxy.State(ctx)
	if err != nil {
		return s, err
	}
	balancers := a.lb.Account()
	s.Balancers = &balancers
	rules, err := ruleset.Open(link.OwnNetNS) // a.rules belongs to the loop
	if err != nil {
		return s, err
	}
	defer rules.Close()
	u, found, err := rules.Unserved(a.state.get().Addresses)
	if found {
		s.Unserved = &u
	}
	return s, err
}

// leaves reports whether a node is about to go: it is deleted, being deleted, or drained by the cluster autoscaler to be deleted.
func leaves(node *corev1.Node, found bool) bool {
	return !found || node.DeletionTimestamp != nil ||
		slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == apinode.TaintToBeDeleted })
}

// tellProxy tells the proxy what it has to know of the node, and of pools of Services' addresses.
func (a *Agent) tellProxy(_ context.Context, p *pass) outcome {
	p.services = a.poolsOfServices()
	p.pools = vip.Read(p.services)
	own := p.facts.Own
	node, _ := a.view.Node(a.Node)
	clusterIPs := a.wantsClusterIPs()
	c := answer.ProxyConfig{
		Mode: a.config.ServiceProxy, Node: svcfacts.Node(node),
		OwnPods:       slices.Concat(own.PodCIDRs, own.Blocks),
		NodePortAddrs: service.NodePortAddrs(a.config.NodePortAddresses, own, p.interfaces),
		Announce:      len(p.services.Pools) > 0 || clusterIPs,
		ExternalIPs:   a.config.ExternalIPs, ExternalIPsFor: a.config.ExternalIPsFor, APIServer: a.Client.ServerAddr(),
	}
	a.proxy.SetExternalIPs(vip.ExternalIPs(*a.config, p.services, p.pools, a.view.Namespaces.All(), c.APIServer))
	a.proxy.SetClusterIPs(clusterIPs)
	if a.config.DNS == netconf.DNSNodeCache {
		c.NodeCaches = netconf.NodeCacheAddrs()
	}
	c.ServiceCIDRs = vip.ServiceRanges(p.services.Services)
	a.proxy.Set(c)
	return outcome{}
}

// keepNodeCache gives the node the addresses of its DNS cache, or takes them away. fathom-dns waits for the first of them, which is
// therefore added last.
func (a *Agent) keepNodeCache(context.Context, *pass) outcome {
	var addrs []netip.Addr
	if a.config.DNS == netconf.DNSNodeCache {
		addrs = netconf.NodeCacheAddrs()
		slices.Reverse(addrs)
	}
	changed, err := a.node.SetNodeCacheAddrs(addrs)
	if changed > 0 {
		a.Log.Info("changed the addresses of the node's DNS cache", "to", addrs)
	}
	return problem(err)
}
