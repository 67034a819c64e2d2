package service

import "net/netip"

// Unserved holds the addresses at which a node refuses packets that are for no Service. No route leads anywhere: without an
// answer a client waits for its timeout, and a packet from outside goes back to the router that sent it, to and fro until
// its TTL expires.
type Unserved struct {
	Ranges []netip.Prefix // the cluster's of Services, those addresses included that no Service has
	// LoadBalancers are the addresses of AddressPools that Services have. They are pinged, too, and the node that gets the ping
	// answers. Not addresses that others gave: they may be machines', with ports of their own.
	LoadBalancers []netip.Addr
	Others        []netip.Addr // of Services that another proxy carries
	Node          []netip.Addr // the node's own, by which it answers pings: at most one of each family
}

// AggregatesTable is the nftables table in which a node refuses what routers send for addresses of aggregates that nobody has:
// docs/design/bgp.md.
const AggregatesTable = "fathom-aggregates"

// Table is the nftables table that sends what comes to Services to their endpoints: docs/design/nftables.md.
const Table = "fathom-services"

// UnservedTable is the nftables table that answers for Services' addresses where no Service does: docs/design/nftables.md.
const UnservedTable = "fathom-unserved"
