package verify

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// announcements computes from the API which node answers for load balancers' addresses and external IPs on the node's
// segments, and whether routers may send their packets to the node, and compares that with what the agent does. It takes
// from the agent which nodes live: the agents know that before the API does.
func (d *differ) announcements(c Cluster, balancers []service.LoadBalanced, a *answer.Balancers) {
	if a == nil || a.Waiting != "" {
		return // an older agent's answer, or no decision yet
	}
	if a.Problem != "" {
		d.add("load balancer: the agent answers for no address: %s", a.Problem)
	}
	f := vip.Facts{Node: d.node, Pools: vip.Read(vip.Objects{Pools: c.AddressPools}), Balancers: balancers, Segments: a.Segments}
	for _, n := range c.Nodes {
		if _, hasAgent := n.Annotations[netfacts.ModeAnnotation]; hasAgent || n.Name == d.node {
			f.Nodes = append(f.Nodes, announcer(n, a))
		}
	}
	have := map[string]string{}
	for _, v := range a.Addresses {
		have[v.Address.String()] = describeVerdict(v)
	}
	for _, v := range f.Judge() {
		addr, want := v.Address.String(), describeVerdict(v)
		switch got, found := have[addr]; {
		case !found:
			d.add("load balancer: the agent has not decided which node answers for %s, want %s", addr, want)
		case got != want:
			d.add("load balancer: %s is %s, want %s", addr, got, want)
		}
		delete(have, addr)
	}
	for addr, got := range have {
		d.add("load balancer: %s is %s, but no Service has it from an AddressPool", addr, got)
	}
}

// announcer is a node as the agent sees it.
func announcer(n *corev1.Node, a *answer.Balancers) vip.Node {
	_, excluded := n.Labels[vip.Exclude]
	return vip.Node{Name: n.Name, Alive: slices.Contains(a.Alive, n.Name), Away: slices.Contains(a.Away, n.Name), Excluded: excluded, Addrs: svcfacts.Node(n).Addrs}
}

func describeVerdict(v vip.Verdict) string {
	text := "answered for by no node here"
	switch {
	case v.Answers:
		text = "answered for by this node"
	case v.Announcer != "":
		text = "answered for by node " + v.Announcer
	}
	if len(v.Devices) > 0 {
		text += fmt.Sprintf(" on %v", v.Devices)
	}
	if v.StandIn != "" {
		text += fmt.Sprintf(", for which %s stands in", v.StandIn)
	}
	return text + fmt.Sprintf(", and may come to %v", v.Eligible)
}
