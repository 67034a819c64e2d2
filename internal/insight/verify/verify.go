// Package verify compares the state of nodes' kernels with what the API implies, and reports the differences.
package verify

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// Cluster holds the objects that determine the nodes' state.
type Cluster struct {
	Nodes  []*corev1.Node
	Pods   []*corev1.Pod // of all namespaces
	Config map[string]string
	Pools  []*v1alpha1.IPPool
	Blocks []*v1alpha1.IPBlock
	// Only for BGP.
	BGPPeers []*v1alpha1.BGPPeer
	// Only for Services.
	Services []*corev1.Service
	Slices   []*discoveryv1.EndpointSlice
	// The ranges that pools must not overlap, and what determines load balancers' addresses.
	AddressPools []*v1alpha1.AddressPool
	ServiceCIDRs []*networkingv1.ServiceCIDR
	Namespaces   []*corev1.Namespace
}

// externalIPs says which external IPs of Services a node serves whose agent has this configuration; pools is the result of
// Read for c.balancing.
func (c Cluster) externalIPs(x answer.ProxyConfig, pools vip.Pools) service.ExternalIPs {
	config := netconf.Config{ExternalIPs: x.ExternalIPs, ExternalIPsFor: x.ExternalIPsFor}
	return vip.ExternalIPs(config, c.balancing(), pools, c.Namespaces, x.APIServer)
}

// balancing returns the objects that determine load balancers' addresses.
func (c Cluster) balancing() vip.Objects {
	return vip.Objects{Pools: c.AddressPools, Nodes: c.Nodes, Services: c.ServiceCIDRs, PodPools: c.Pools}
}

// pools returns the facts of the cluster's address pools.
func (c Cluster) pools() ippool.Facts {
	return ippool.Read(ippool.Objects{Pools: c.Pools, Blocks: c.Blocks, Nodes: c.Nodes, Services: c.ServiceCIDRs, AddressPools: c.AddressPools})
}

// Pods compares what a node holds for the pod network with what the cluster's objects imply. It computes the plan from the
// objects: the agent's plan is what it does, not what is right.
func Pods(c Cluster, node string, s answer.Node) []podnet.Difference {
	d := differ{node: node}
	config, err := netconf.Parse(c.Config)
	if err != nil { // the agent keeps the previous one
		d.add("the configuration is invalid, and the previous one is kept: %v", answer.OneLine(err))
		config = s.Config
	}
	if !s.Ready {
		d.add("the agent is not ready: %s", s.Reason)
	}
	pools := c.pools()
	f := netfacts.Read(c.Nodes, node, config).WithBlocks(pools.Blocks)
	plan, problems := podnet.NewPlan(node, s.Interfaces, f.Nodes, f.Config)
	for _, p := range append(f.Problems, problems...) {
		if p.Node == "" || p.Node == node {
			d.add("%s", p.Text)
		}
	}
	if plan.Node != "" {
		d.found = append(d.found, podnet.Diff(plan, s.Kernel)...)
	}
	for _, text := range s.FastPath.Differences {
		d.add("fast path: %s", text)
	}
	d.devices(c.Pods, d.addresses(c.Pods, s), s, plan, f.Own.PodCIDRs)
	d.blocks(pools, s)
	slices.SortFunc(d.found, func(a, b podnet.Difference) int { return cmp.Compare(a.Text, b.Text) })
	return slices.Compact(d.found)
}

type differ struct {
	node  string
	found []podnet.Difference
}

func (d *differ) add(format string, args ...any) {
	d.found = append(d.found, podnet.Difference{Node: d.node, Text: fmt.Sprintf(format, args...)})
}

// holders are a node's leases by the pod's UID and name. A pod has several if its sandbox was recreated and the previous
// sandbox's addresses were not taken back.
type holders map[string][]answer.Lease

func holderOf(uid, namespace, name string) string { return uid + " " + namespace + "/" + name }

// of returns the lease of a pod; of several, the one with its addresses. Some runtimes pass no UIDs.
func (h holders) of(p *corev1.Pod) (answer.Lease, bool) {
	all := slices.Concat(h[holderOf(string(p.UID), p.Namespace, p.Name)], h[holderOf("", p.Namespace, p.Name)])
	if len(all) == 0 {
		return answer.Lease{}, false
	}
	i := slices.IndexFunc(all, func(l answer.Lease) bool { return sameAddrs(podAddrs(p), l.Addresses) })
	return all[max(i, 0)], true
}

// addresses compares pods with leases, and returns the node's leases.
func (d *differ) addresses(pods []*corev1.Pod, s answer.Node) holders {
	leases, known, taken := holders{}, map[string]bool{}, map[netip.Addr]string{}
	for _, l := range s.Leases {
		name := l.Namespace + "/" + l.Pod
		for _, a := range l.Addresses {
			if other, found := taken[a]; found {
				d.add("address %s is held for %s and for %s", a, other, name)
			}
			taken[a] = name
		}
		key := holderOf(l.UID, l.Namespace, l.Pod)
		leases[key] = append(leases[key], l)
	}
	for _, p := range pods {
		if p.Spec.NodeName != d.node || p.Spec.HostNetwork {
			continue
		}
		known[holderOf(string(p.UID), p.Namespace, p.Name)], known[holderOf("", p.Namespace, p.Name)] = true, true
		have := podAddrs(p)
		if len(have) == 0 || finished(p) {
			continue // it has none yet, or no longer any
		}
		l, found := leases.of(p)
		switch {
		case !found:
			d.add("pod %s/%s has %s without a lease", p.Namespace, p.Name, join(have))
		case !sameAddrs(have, l.Addresses):
			d.add("pod %s/%s has %s in the API, but its lease is for %s", p.Namespace, p.Name, join(have), join(l.Addresses))
		}
		for _, other := range leases[holderOf(l.UID, l.Namespace, l.Pod)] {
			if found && other.ContainerID != l.ContainerID {
				d.add("pod %s/%s holds %s, and additionally %s", p.Namespace, p.Name, join(l.Addresses), join(other.Addresses))
			}
		}
	}
	for _, l := range s.Leases {
		if !known[holderOf(l.UID, l.Namespace, l.Pod)] {
			d.add("%s is held for pod %s/%s, which does not exist", join(l.Addresses), l.Namespace, l.Pod)
		}
	}
	return leases
}

// devices compares pods with the devices, routes and neighbours by which the node reaches them.
func (d *differ) devices(pods []*corev1.Pod, leases holders, s answer.Node, plan podnet.Plan, ranges []netip.Prefix) {
	ends, leased := map[string]podnet.PodEnd{}, map[string]bool{}
	for _, e := range s.Pods {
		ends[e.Device] = e
	}
	for _, p := range pods {
		l, found := leases.of(p)
		if !found || p.Spec.NodeName != d.node || p.Spec.HostNetwork || finished(p) || len(podAddrs(p)) == 0 {
			continue
		}
		d.device(p.Namespace+"/"+p.Name, l, ends, plan, ranges)
	}
	for _, l := range s.Leases {
		leased[l.Device] = true
	}
	for _, e := range s.Pods {
		if !leased[e.Device] {
			d.add("device %s (%s) has no lease", e.Device, e.Alias)
		}
	}
	for _, a := range s.Strays {
		d.add("route %s leads to no pod's device", a)
	}
}

func (d *differ) device(pod string, l answer.Lease, ends map[string]podnet.PodEnd, plan podnet.Plan, ranges []netip.Prefix) {
	end, found := ends[l.Device]
	if !found {
		d.add("pod %s has no device: %s is missing", pod, l.Device)
		return
	}
	for _, a := range l.Addresses {
		if l.Pool == netconf.DefaultPool && !inet.Contains(ranges, a) {
			d.add("pod %s has %s, which is in none of the node's ranges %v", pod, a, ranges)
		}
		if !slices.Contains(end.Routes, a) {
			d.add("route %s dev %s to pod %s is missing", a, end.Device, pod)
		}
		if !slices.Contains(end.Neighbours, a) {
			d.add("neighbour %s dev %s of pod %s is missing", a, end.Device, pod)
		}
	}
	for _, a := range end.Routes {
		if !slices.Contains(l.Addresses, a) {
			d.add("route %s dev %s should not be there: pod %s does not have that address", a, end.Device, pod)
		}
	}
	if plan.PodMTU != 0 && end.MTU != plan.PodMTU {
		d.add("device %s of pod %s has MTU %d, but the network's is %d", end.Device, pod, end.MTU, plan.PodMTU)
	}
}

// blocks compares leases and the ranges that the node assigns addresses from with its blocks.
func (d *differ) blocks(f ippool.Facts, s answer.Node) {
	own := f.Of(d.node)
	for _, l := range s.Leases {
		if l.Pool == netconf.DefaultPool || l.Pool == "" {
			continue
		}
		for _, a := range l.Addresses {
			if !slices.ContainsFunc(own, func(b ippool.Block) bool { return b.Contains(a) }) {
				d.add("pod %s/%s has %s of pool %s, which is in no block of the node", l.Namespace, l.Pod, a, l.Pool)
			}
		}
	}
	for _, p := range s.Pools {
		if p.Name == netconf.DefaultPool {
			continue
		}
		for _, r := range slices.Concat(p.Ranges, p.Fixed) {
			if !slices.ContainsFunc(own, func(b ippool.Block) bool { return b.Prefix == r }) {
				d.add("addresses of %s are assigned, which is not a block of the node", r)
			}
		}
	}
}

// Blocks returns problems with blocks: those that no node uses, because of their contents or an overlap, and those of
// deleted nodes.
func Blocks(c Cluster) []podnet.Difference {
	var d differ
	f := c.pools()
	for _, r := range f.Refused {
		d.node = r.Node
		d.add("%s", r)
	}
	for _, b := range f.Blocks {
		d.node = b.Node
		if f.NodeUID(b.Node) == "" {
			d.add("block %s of pool %s belongs to a node that does not exist", b.Prefix, b.Pool)
		}
	}
	return d.found
}

// Doubles returns addresses that several of the cluster's pods have.
func Doubles(pods []*corev1.Pod) []podnet.Difference {
	var d differ
	holder := map[netip.Addr]*corev1.Pod{}
	for _, p := range pods {
		if p.Spec.HostNetwork || finished(p) {
			continue
		}
		for _, a := range podAddrs(p) {
			if other, taken := holder[a]; taken {
				d.node = p.Spec.NodeName
				d.add("pod %s/%s has %s, and so does %s/%s on node %s", p.Namespace, p.Name, a, other.Namespace, other.Name, other.Spec.NodeName)
			}
			holder[a] = p
		}
	}
	return d.found
}

func finished(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func podAddrs(p *corev1.Pod) []netip.Addr {
	var list []netip.Addr
	for _, i := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(i.IP); err == nil {
			list = append(list, a)
		}
	}
	return list
}

func sameAddrs(a, b []netip.Addr) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.SortFunc(a, netip.Addr.Compare)
	slices.SortFunc(b, netip.Addr.Compare)
	return slices.Equal(a, b)
}

func join(list []netip.Addr) string {
	var words []string
	for _, a := range list {
		words = append(words, a.String())
	}
	return strings.Join(words, ",")
}
