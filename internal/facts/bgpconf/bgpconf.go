// Package bgpconf computes a node's BGP peers and what it announces to each, from BGPPeer objects and what is known of the
// node. docs/design/bgp.md says why.
package bgpconf

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Speaker is everything that a node announces. The zero value announces nothing.
type Speaker struct {
	// RouterID is the node's BGP identifier. It is written like an IPv4 address, and need not be one.
	RouterID netip.Addr
	Peers    []Peer // ordered by name
}

// Peer is a router that the node connects to, with its announcements.
type Peer struct {
	Name    string         // of the BGPPeer
	Address netip.AddrPort // with the device as its zone where it is link-local
	// Unnumbered says that the BGPPeer names only the device: the address was heard there, and may change.
	Unnumbered bool
	ASN        uint32
	LocalASN   uint32
	Password   Password // of TCP's MD5 signatures, RFC 2385; empty for none
	// HoldTime is the silence after which the session is considered dead, Keepalive the interval of keepalive messages.
	HoldTime, Keepalive time.Duration
	// Hops is how many hops away an external peer may be; 1 is a neighbour.
	Hops uint8
	// TTLSecurity drops packets from further away than that, RFC 5082.
	TTLSecurity bool
	// RestartTime is how long the router keeps the routes after the session was cut: graceful restart, RFC 4724.
	// Zero is none.
	RestartTime time.Duration
	Routes      []Route // sorted by prefix
}

// Route is a prefix that the node announces.
type Route struct {
	Prefix netip.Prefix
	// NextHop, if unset, is the node's address in the session. An IPv4 prefix in a session over IPv6 has none if it is to
	// be announced with that IPv6 address, to a router that supports it: RFC 8950.
	NextHop     netip.Addr
	Communities []Community // sorted
	// LocalPref is the attribute of this name, for a peer of the same AS; nil is the usual 100.
	LocalPref *uint32
	// Addrs are the Services' addresses that it is announced for; sorted. Routers do not get them.
	Addrs []netip.Addr
}

// Like reports whether two routes are equal to the router.
func (r Route) Like(o Route) bool {
	return r.Prefix == o.Prefix && r.NextHop == o.NextHop && slices.Equal(r.Communities, o.Communities) &&
		(r.LocalPref == nil) == (o.LocalPref == nil) && (r.LocalPref == nil || *r.LocalPref == *o.LocalPref)
}

// Password is never shown in logs.
type Password string

func (p Password) String() string {
	if p == "" {
		return "none"
	}
	return "hidden"
}

// GoString is String, for %#v.
func (p Password) GoString() string { return p.String() }

// Defaults of a BGPPeer, as the CRD has them.
const (
	DefaultPort        = 179
	DefaultHoldTime    = 90 * time.Second
	DefaultKeepalive   = 30 * time.Second
	DefaultRestartTime = 120 * time.Second
	DefaultSecret      = "fathom-bgp" // of passwords; deploy/fathom.yaml lets agents read it
)

// Node is what is known of a node.
type Node struct {
	Name   string
	Labels map[string]string
	// Addrs are its own addresses, the one it prefers first.
	Addrs []netip.Addr
	// Links are its devices that have addresses beside link-local ones.
	Links []Link
	// Heard is what was received on the devices of Interfaces.
	Heard    map[string]Heard
	PodCIDRs []netip.Prefix
	// ServiceAddresses are those of Services for which the node should attract packets. An address that Services share is
	// listed once for each.
	ServiceAddresses []ServiceAddress
}

// Link is a device.
type Link struct {
	Device string
	Addrs  []netip.Prefix // each with the length of the prefix that is on the segment
}

// Heard is the router that advertises itself on a link.
type Heard struct {
	Router netip.Addr // link-local, without a zone; invalid if there was none
	Other  netip.Addr // another one, if there was
	// Problem says why the node cannot receive or send advertisements there.
	Problem string
}

// ServiceAddress is an address of a Service.
type ServiceAddress struct {
	Addr netip.Addr
	Kind v1alpha1.BGPAddresses
	// Pool is the AddressPool that contains it, and PoolLabels the pool's labels. A ClusterIP is in none.
	Pool       string
	PoolLabels labels.Set
	Service    service.Name
	Labels     labels.Set // of the Service
}

// Like says whether two are the same to every BGPPeer.
func (a ServiceAddress) Like(b ServiceAddress) bool {
	return a.Addr == b.Addr && a.Kind == b.Kind && a.Pool == b.Pool && a.Service == b.Service && maps.Equal(a.PoolLabels, b.PoolLabels) && maps.Equal(a.Labels, b.Labels)
}
