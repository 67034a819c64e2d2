package verify

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// unserved reports where packets that are for no Service are refused and should not be, and the reverse.
func (d *differ) unserved(c Cluster, pools vip.Pools, balancers []service.LoadBalanced, s answer.Services) {
	var others []netip.Addr
	for _, svc := range c.Services {
		others = append(others, svcfacts.ForeignAddrs(svc)...)
	}
	own := netfacts.Read(c.Nodes, d.node, netconf.Default()).Own.Addrs
	want := service.UnservedAsHeld(vip.Unserved(vip.ServiceRanges(c.ServiceCIDRs), pools, balancers, s.Config.ExternalIPsFor, others, own))
	table := "nftables: table inet " + service.UnservedTable
	if s.Unserved == nil {
		d.add("%s, which refuses packets for unused addresses of Services, is missing, or its rules are wrong", table)
		return
	}
	have := *s.Unserved
	differences(want.Ranges, have.Ranges,
		func(p netip.Prefix) { d.add("%s: packets for unused addresses in %s are not refused", table, p) },
		func(p netip.Prefix) {
			d.add("%s: packets for %s are refused, which is in no range of Services and no pool", table, p)
		})
	differences(want.LoadBalancers, have.LoadBalancers,
		func(a netip.Addr) {
			d.add("%s: pings of %s are not answered, which a Service has from an AddressPool", table, a)
		},
		func(a netip.Addr) {
			d.add("%s: pings of %s are answered, which no Service has from an AddressPool", table, a)
		})
	differences(want.Others, have.Others,
		func(a netip.Addr) {
			d.add("%s: %s is not left to the other proxy, which carries its Service", table, a)
		},
		func(a netip.Addr) { d.add("%s: %s is left to another proxy, which has no Service there", table, a) })
	if !slices.Equal(want.Node, have.Node) {
		d.add("%s: pings are answered by %s, want %s", table, fmt.Sprint(have.Node), fmt.Sprint(want.Node))
	}
}

// differences calls missing for items that are wanted and absent, and more for items that are present and not wanted.
func differences[T comparable](want, have []T, missing, more func(T)) {
	for _, x := range want {
		if !slices.Contains(have, x) {
			missing(x)
		}
	}
	for _, x := range have {
		if !slices.Contains(want, x) {
			more(x)
		}
	}
}
