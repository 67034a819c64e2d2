package vip

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Reserved returns the ranges that belong to the cluster itself, and that no Service may have as a load balancer's address
// or as an external IP: of Services, of pods, and nodes' own addresses. They are sorted, and those that make no sense are
// left out.
func Reserved(o Objects) []service.Reserved {
	var all []service.Reserved
	add := func(cidr string, owner service.ReservedOwner, name string) {
		if p, err := netip.ParsePrefix(cidr); err == nil {
			all = append(all, service.Reserved{Prefix: p, Owner: owner, Name: name})
		}
	}
	for _, s := range o.Services {
		for _, c := range s.Spec.CIDRs {
			add(c, service.ReservedServiceCIDR, s.Name)
		}
	}
	for _, p := range o.PodPools {
		for _, r := range []*v1alpha1.IPPoolRange{p.Spec.IPv4, p.Spec.IPv6} {
			if r != nil {
				add(r.CIDR, service.ReservedIPPool, p.Name)
			}
		}
	}
	for _, n := range o.Nodes {
		for _, c := range apinode.PodCIDRs(n) {
			add(c, service.ReservedPodCIDR, n.Name)
		}
		for _, a := range apinode.Addrs(n) {
			all = append(all, service.Reserved{Prefix: netip.PrefixFrom(a, a.BitLen()), Owner: service.ReservedNode, Name: n.Name})
		}
	}
	slices.SortFunc(all, func(a, b service.Reserved) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()), cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// ServiceRanges are the ranges of Services' addresses, sorted.
func ServiceRanges(all []*networkingv1.ServiceCIDR) []netip.Prefix {
	var ranges []netip.Prefix
	for _, s := range all {
		for _, cidr := range s.Spec.CIDRs {
			if p, err := netip.ParsePrefix(cidr); err == nil { // the API server has seen to that
				ranges = append(ranges, p)
			}
		}
	}
	slices.SortFunc(ranges, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return ranges
}

// Unserved returns at which addresses a node, whose own are node, refuses what is for no Service: in the ranges, and at those
// that Services have of the pools. others are the addresses of Services that another proxy carries. Who has external IPs for
// pods alone lets the node itself reach another machine by them.
func Unserved(ranges []netip.Prefix, pools Pools, balancers []service.LoadBalanced, external netconf.ExternalIPsFor, others, node []netip.Addr) service.Unserved {
	u := service.Unserved{Ranges: ranges, Others: others, Node: node}
	for _, l := range balancers {
		addrs := l.Addrs
		if external != netconf.ExternalIPsForPods {
			addrs = slices.Concat(addrs, l.ExternalIPs)
		}
		for _, addr := range addrs {
			if pools.Contains(addr) {
				u.LoadBalancers = append(u.LoadBalancers, addr)
			}
		}
	}
	slices.SortFunc(u.LoadBalancers, netip.Addr.Compare)
	u.LoadBalancers = slices.Compact(u.LoadBalancers)
	return u
}

// ExternalIPs returns which external IPs of Services are served; pools are what was Read of the objects. apiServer is the address at which the API server is
// reached, where that is known; the zero value otherwise.
func ExternalIPs(c netconf.Config, o Objects, pools Pools, namespaces []*corev1.Namespace, apiServer netip.Addr) service.ExternalIPs {
	x := service.ExternalIPs{Mode: c.ExternalIPs, PodsOnly: c.ExternalIPsFor == netconf.ExternalIPsForPods, Reserved: Reserved(o)}
	one := func(a netip.Addr, owner service.ReservedOwner) {
		x.Reserved = append(x.Reserved, service.Reserved{Prefix: netip.PrefixFrom(a, a.BitLen()), Owner: owner})
	}
	if apiServer.IsValid() {
		one(apiServer, service.ReservedAPIServer)
	}
	for _, a := range netconf.NodeCacheAddrs() {
		one(a, service.ReservedNodeCache)
	}
	for _, p := range pools {
		if p.Problem != nil && p.Problem.Reason == InvalidField {
			continue // it could be meant for fewer Services than can be read out of it
		}
		pool := service.ExternalIPPool{Name: p.Name, Contains: p.contains, Selector: p.services.String()}
		pool.Selects = func(l map[string]string) bool { return p.services.Matches(labels.Set(l)) }
		var ranges []string
		for _, r := range p.Ranges {
			ranges = append(ranges, r.String())
		}
		pool.Ranges = strings.Join(ranges, ",")
		if !p.namespaces.Empty() {
			pool.Namespaces = map[string]bool{}
			for _, n := range namespaces {
				if p.namespaces.Matches(labels.Set(n.Labels)) {
					pool.Namespaces[n.Name] = true
				}
			}
		}
		x.Pools = append(x.Pools, pool)
	}
	return x
}
