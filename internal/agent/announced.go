package agent

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent/announcing"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/keyset"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

func (a *Agent) newBalancer() *announcing.Balancer {
	return announcing.NewBalancer(announcing.Options{Node: a.Node, Log: a.Log, Resync: a.Resync, Namespace: a.node,
		Source: announcingSource{a}, Changed: a.Wake, Registry: a.metrics.registry})
}

func (a *Agent) newBGP() *announcing.BGP {
	return announcing.NewBGP(announcing.BGPOptions{Node: a.Node, Log: a.Log, Resync: a.Resync, Namespace: a.node, Rules: a.rules,
		API: a.Client, Events: a.events, Writes: a.writes, Changed: a.Wake, Registry: a.metrics.registry})
}

// announcingSource is announcing.Source: it asks the agent's other parts.
type announcingSource struct{ a *Agent }

func (s announcingSource) Nodes() []*corev1.Node                 { return s.a.view.Nodes.All() }
func (s announcingSource) AddressPools() []*v1alpha1.AddressPool { return s.a.view.AddressPools.All() }
func (s announcingSource) LoadBalancers() ([]service.LoadBalanced, bool) {
	return s.a.proxy.LoadBalancers()
}
func (s announcingSource) TellsClusterIPs() bool { return s.a.proxy.TellsClusterIPs() }

func (s announcingSource) Keys(ctx context.Context) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	data, err := s.a.Client.Secret(ctx, netconf.Namespace, keyset.Secret)
	if err != nil {
		return nil, err
	}
	return keyset.Read(data)
}

func (a *Agent) tellBalancer(_ context.Context, p *pass) outcome {
	a.lb.Set(p.facts.Own, p.interfaces)
	return outcome{}
}

func (a *Agent) announceToRouters(ctx context.Context, p *pass) outcome {
	if !a.view.BGPPeers.Listed() {
		return outcome{} // no CRD, or not heard of yet: what is announced stays
	}
	addresses, known := a.lb.Routed(a.wantsClusterIPs())
	if !known {
		return outcome{}
	}
	return outcome{problems: a.bgp.Announce(ctx, announcing.Known{Peers: a.view.BGPPeers.All(), Nodes: a.view.Nodes.All(), Own: p.facts.Own, Interfaces: p.interfaces, Addresses: addresses})}
}

// wantsClusterIPs says whether a router of this node's is to be told of ClusterIPs.
func (a *Agent) wantsClusterIPs() bool {
	peers := a.view.BGPPeers.All()
	node, _ := a.view.Node(a.Node)
	return slices.ContainsFunc(peers, func(p *v1alpha1.BGPPeer) bool {
		selected, err := bgpconf.Selects(p, node.Labels)
		return err == nil && selected && bgpconf.ForServices(p, v1alpha1.BGPClusterIP)
	})
}
