// Package apinode reads what is written in a Node of the API: its addresses, its ranges, its condition.
//
// Whether an ExternalIP counts depends on the question. Nodes reach each other by InternalIPs: an ExternalIP is often
// translated by a cloud's router, so that packets to it leave the network and come back with another source. But both are the
// node's own: no Service, pool or load balancer may have either, and whoever comes to a node may come by either.
package apinode

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Internal returns the addresses by which other nodes reach a node, as they are written: what is wrong with one is for the
// caller to tell.
func Internal(n *corev1.Node) []string {
	return written(n, func(t corev1.NodeAddressType) bool { return t == corev1.NodeInternalIP })
}

// InternalAddrs returns what can be read of Internal, sorted and each once.
func InternalAddrs(n *corev1.Node) []netip.Addr { return parse(Internal(n)) }

// Addrs returns all addresses that are a node's own, internal and external, sorted and each once. What is no address is left
// out.
func Addrs(n *corev1.Node) []netip.Addr {
	return parse(written(n, func(t corev1.NodeAddressType) bool { return t == corev1.NodeInternalIP || t == corev1.NodeExternalIP }))
}

func written(n *corev1.Node, wanted func(corev1.NodeAddressType) bool) []string {
	var all []string
	for _, a := range n.Status.Addresses {
		if wanted(a.Type) {
			all = append(all, a.Address)
		}
	}
	return all
}

func parse(written []string) []netip.Addr {
	var all []netip.Addr
	for _, w := range written {
		if addr, err := inet.ParseAddr(w); err == nil {
			all = append(all, addr)
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// PodCIDRs returns the ranges of a node's pods as they are written. An old object has the first of them alone.
func PodCIDRs(n *corev1.Node) []string {
	if len(n.Spec.PodCIDRs) == 0 && n.Spec.PodCIDR != "" {
		return []string{n.Spec.PodCIDR}
	}
	return n.Spec.PodCIDRs
}

// Ready says whether the node has the condition Ready.
func Ready(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// TaintToBeDeleted is on a node that the cluster autoscaler drains to take it away (KEP-3836).
const TaintToBeDeleted = "ToBeDeletedByClusterAutoscaler"
