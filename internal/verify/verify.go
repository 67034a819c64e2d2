// Package verify proves the state of nodes' kernels against what the API implies, and says where they differ.
package verify

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/netfacts"
	"github.com/fathom-network/fathom/internal/nodestate"
	"github.com/fathom-network/fathom/internal/podnet"
)

// Cluster is what the API says, whole.
type Cluster struct {
	Nodes  []*corev1.Node
	Pods   []*corev1.Pod // of all namespaces
	Config map[string]string
}

// Pods compares what one node holds for the pod network with what the cluster's objects imply. The plan is worked
// out anew from the objects: that of the agent is what it does, not what is right.
func Pods(c Cluster, node string, s nodestate.State) []podnet.Difference {
	d := differ{node: node}
	config, err := netconf.Parse(c.Config)
	if err != nil { // the agent follows the one before it
		d.add("the configuration is not followed: %v", strings.ReplaceAll(err.Error(), "\n", "; "))
		config = s.Config
	}
	if !s.Ready {
		d.add("the agent is not ready: %s", s.Reason)
	}
	f := netfacts.Read(c.Nodes, node, config)
	plan, problems := podnet.NewPlan(node, s.Interfaces, f.Nodes, f.Config)
	for _, p := range append(f.Problems, problems...) {
		if p.Node == "" || p.Node == node {
			d.add("%s", p.Text)
		}
	}
	if plan.Node != "" {
		d.found = append(d.found, podnet.Diff(plan, s.Kernel)...)
	}
	d.pods(c.Pods, s, plan, f.Own.PodCIDRs)
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

// pods compares pods, leases, devices and routes, each with each.
func (d *differ) pods(pods []*corev1.Pod, s nodestate.State, plan podnet.Plan, ranges []netip.Prefix) {
	leases := map[string]nodestate.Lease{} // by pod
	holder := map[netip.Addr]string{}
	for _, l := range s.Leases {
		name := l.Namespace + "/" + l.Pod
		for _, a := range l.Addresses {
			if other, taken := holder[a]; taken {
				d.add("address %s is held by %s and by %s", a, other, name)
			}
			holder[a] = name
		}
		leases[l.UID+" "+name] = l
	}
	ends := map[string]nodestate.PodEnd{}
	for _, e := range s.Pods {
		ends[e.Device] = e
	}
	known := map[string]bool{}
	for _, p := range pods {
		if p.Spec.NodeName != d.node || p.Spec.HostNetwork {
			continue
		}
		name := p.Namespace + "/" + p.Name
		known[string(p.UID)+" "+name], known[" "+name] = true, true
		addresses := podAddrs(p)
		if len(addresses) == 0 || finished(p) {
			continue // it has none yet, or no longer
		}
		l, found := leases[string(p.UID)+" "+name]
		if !found {
			l, found = leases[" "+name] // a runtime that does not tell UIDs
		}
		if !found {
			d.add("pod %s has %s, and no lease says so", name, join(addresses))
			continue
		}
		if !sameAddrs(addresses, l.Addresses) {
			d.add("pod %s has %s in the API and holds %s", name, join(addresses), join(l.Addresses))
		}
		for _, a := range l.Addresses {
			if l.Pool == netconf.DefaultPool && !slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) }) {
				d.add("pod %s has %s, which is in none of the node's ranges %v", name, a, ranges)
			}
		}
		end, found := ends[l.Device]
		if !found {
			d.add("pod %s has no device: %s is missing", name, l.Device)
			continue
		}
		for _, a := range l.Addresses {
			if !slices.Contains(end.Routes, a) {
				d.add("route %s dev %s to pod %s is missing", a, end.Device, name)
			}
			if !slices.Contains(end.Neighbours, a) {
				d.add("neighbour %s dev %s of pod %s is missing", a, end.Device, name)
			}
		}
		for _, a := range end.Routes {
			if !slices.Contains(l.Addresses, a) {
				d.add("route %s dev %s should not be there: pod %s does not have that address", a, end.Device, name)
			}
		}
		if plan.PodMTU != 0 && end.MTU > plan.PodMTU {
			d.add("device %s of pod %s has MTU %d, and %d is what the network carries", end.Device, name, end.MTU, plan.PodMTU)
		}
	}
	leased := map[string]bool{}
	for key, l := range leases {
		leased[l.Device] = true
		if !known[key] {
			d.add("%s held for pod %s/%s, which is not there", join(l.Addresses), l.Namespace, l.Pod)
		}
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

// Doubles returns addresses that several pods of a cluster have.
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
