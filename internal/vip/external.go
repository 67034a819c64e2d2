package vip

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/service"
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
		cidrs := n.Spec.PodCIDRs
		if len(cidrs) == 0 {
			cidrs = []string{n.Spec.PodCIDR}
		}
		for _, c := range cidrs {
			add(c, service.ReservedPodCIDR, n.Name)
		}
		for _, a := range nodeAddrs(n) {
			all = append(all, service.Reserved{Prefix: netip.PrefixFrom(a, a.BitLen()), Owner: service.ReservedNode, Name: n.Name})
		}
	}
	slices.SortFunc(all, func(a, b service.Reserved) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()), cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Name, b.Name))
	})
	return all
}

// ExternalIPs returns which external IPs of Services are served. apiServer is the address at which the API server is
// reached, where that is known; the zero value otherwise.
func ExternalIPs(c netconf.Config, o Objects, namespaces []*corev1.Namespace, apiServer netip.Addr) service.ExternalIPs {
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
	for _, p := range Read(o) {
		if p.Problem != nil && p.Problem.Reason == InvalidField {
			continue // it could be meant for fewer Services than can be read out of it
		}
		pool := service.ExternalIPPool{Name: p.Name, Contains: p.contains, Services: p.services}
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
