package topology

import (
	"strconv"

	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// usualMaxPods is how many pods kubelet runs if nobody says otherwise.
// https://kubernetes.io/docs/setup/best-practices/cluster-large/
const usualMaxPods = 110

// MaxPods is how many pods the node's kubelet may run: kubelet's usual number, or fewer where the node's range of addresses
// holds fewer. Otherwise the scheduler would go on to choose the node, and its pods wait for an address that never comes.
// Pods of the lab itself that have the node's own address take none of the range. A user's own number stands in its place.
func (c *Cluster) MaxPods(n *Node) int {
	if own := c.KubeletArgs["max-pods"]; len(own) > 0 {
		if number, err := strconv.Atoi(own[len(own)-1]); err == nil { // kubelet takes the last
			return number
		}
	}
	return min(usualMaxPods, c.room(n))
}

// room is how many pods have an address on the node. A network that the lab does not know may give out any.
func (c *Cluster) room(n *Node) int {
	const unknown = 1 << 20
	if c.Network.Kind == NetworkNone {
		return unknown
	}
	room := unknown
	for _, r := range n.PodCIDRs {
		room = int(min(uint64(room), ipam.Size(r)))
	}
	return room + c.hostPods(n)
}

// hostPods counts the lab's own pods on the node that have the node's address.
func (c *Cluster) hostPods(n *Node) int {
	pods := 0
	for _, runs := range []bool{
		c.Network.Kind == NetworkFathom || c.Network.Kind == NetworkFlannel,
		c.Proxy.Kind == ProxyKubeProxy,
		c.DNS == DNSNodeCache,
	} {
		if runs {
			pods++
		}
	}
	if n.Role == ControlPlane {
		pods += 4 // etcd, kube-apiserver, kube-controller-manager, kube-scheduler
	}
	return pods
}

// maxPods checks a user's own number. Fathom's network has more addresses than the node's range where there are IPPools, and
// so has any number.
func (b *builder) maxPods(given []text, c *Cluster) {
	for _, v := range given {
		number, err := strconv.Atoi(v.value)
		switch {
		case err != nil || number < 1:
			b.add(v.at, v.value, "want a number of pods from 1 up")
		case c.Network.Kind != NetworkBridge && c.Network.Kind != NetworkFlannel:
		default:
			for i := range c.Nodes {
				if n := &c.Nodes[i]; len(n.PodCIDRs) > 0 && number > c.room(n) {
					b.add(v.at, v.value, "the range of a node, such as %s, has addresses for %d pods; want at most that, or a smaller nodeCIDRMask", n.PodCIDRs[0], c.room(n))
					break
				}
			}
		}
	}
}
