package dataplane

import (
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/netfacts"
	"github.com/fathom-network/fathom/internal/podnet"
	"github.com/fathom-network/fathom/internal/proxy"
	"github.com/fathom-network/fathom/internal/service"
	"github.com/fathom-network/fathom/internal/vip"
)

// proxyPaths are the proxy's, of a node with these paths.
func proxyPaths(p Paths) proxy.Paths {
	return proxy.Paths{BPF: filepath.Join(p.BPF, "services"), Cgroup: p.Cgroup, NetNS: p.NetNS}
}

func (a *Agent) newProxy() *proxy.Proxy {
	p := proxy.New(proxy.Options{
		Client: a.Client, Log: a.Log, Paths: proxyPaths(a.Paths), Resync: a.Resync, Loopback: loopback{a.settings},
		Changed: func() {
			a.Wake()
			a.lb.wake()
		},
	})
	a.metrics.registry.MustRegister(p)
	return p
}

// carryServices tells the proxy what it has to know of the node.
func (a *Agent) carryServices(f netfacts.Facts, interfaces []podnet.Interface) {
	node, _ := a.view.Node(a.Node)
	c := proxy.Config{
		Mode: a.config.ServiceProxy, Node: service.NodeOf(node),
		OwnPods:       slices.Concat(f.Own.PodCIDRs, f.Own.Blocks),
		NodePortAddrs: nodePortAddrs(a.config.NodePortAddresses, f.Own, interfaces),
		Announce:      len(a.view.AddressPools()) > 0,
		ExternalIPs:   a.config.ExternalIPs, ExternalIPsFor: a.config.ExternalIPsFor, APIServer: a.Client.ServerAddr(),
	}
	a.proxy.SetExternalIPs(vip.ExternalIPs(*a.config, vip.Objects{
		Pools: a.view.AddressPools(), Nodes: a.view.Nodes(), Services: a.view.ServiceCIDRs(), PodPools: a.view.Pools(),
	}, a.view.Namespaces(), c.APIServer))
	if a.config.DNS == netconf.DNSNodeCache {
		c.NodeCaches = netconf.NodeCacheAddrs()
	}
	for _, s := range a.view.ServiceCIDRs() {
		for _, cidr := range s.Spec.CIDRs {
			if p, err := netip.ParsePrefix(cidr); err == nil { // the API server has seen to that
				c.ServiceCIDRs = append(c.ServiceCIDRs, p)
			}
		}
	}
	slices.SortFunc(c.ServiceCIDRs, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	a.proxy.Set(c)
}

// setNodeCache gives the node the addresses of its DNS cache, or takes them away. The cache, fathom-dns, waits for the
// first of them, so that one comes last.
func (a *Agent) setNodeCache() error {
	var addrs []netip.Addr
	if a.config.DNS == netconf.DNSNodeCache {
		addrs = netconf.NodeCacheAddrs()
		slices.Reverse(addrs)
	}
	changed, err := a.node.SetNodeCacheAddrs(addrs)
	if changed > 0 {
		a.Log.Info("changed the addresses of the node's DNS cache", "to", addrs)
	}
	return err
}

// nodePortAddrs are the addresses at which NodePorts answer: those in the ranges, or, without ranges, the node's own.
func nodePortAddrs(ranges []netip.Prefix, own podnet.Node, interfaces []podnet.Interface) []netip.Addr {
	addrs := slices.Clone(own.Addrs)
	if len(ranges) > 0 {
		addrs = nil
		for _, i := range interfaces {
			for _, p := range i.Addrs {
				if slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(p.Addr()) }) {
					addrs = append(addrs, p.Addr())
				}
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}
