package service

import "net/netip"

// Unserved holds the addresses at which a node refuses packets that are for no Service. No route leads anywhere: without an
// answer a client waits for its timeout, and a packet from outside goes back to the router that sent it, to and fro until
// its TTL expires.
type Unserved struct {
	Ranges []netip.Prefix // the ServiceCIDRs, with the addresses that no Service has
	// LoadBalancers are the Services' addresses from AddressPools. People ping them, and the node that receives the ping answers.
	// Addresses from other sources are not among them: they may belong to machines with ports of their own.
	LoadBalancers []netip.Addr
	Others        []netip.Addr // addresses of Services that another proxy carries
	Node          []netip.Addr // the node's own, with which it answers pings: at most one of each family
}

// AggregatesTable is the nftables table that rejects packets from routers to unused addresses of an announced aggregate:
// docs/design/bgp.md.
const AggregatesTable = "fathom-aggregates"

// Table is the nftables table that translates Services' addresses to those of endpoints: docs/design/nftables.md.
const Table = "fathom-services"

// UnservedTable is the nftables table that rejects packets to addresses and ports of no Service: docs/design/nftables.md.
const UnservedTable = "fathom-unserved"
