// Package service says what Services mean on one node: at which addresses and ports a Service is met there, and to
// which endpoints what comes to them may go. It knows nothing of the API's objects, which svcfacts reads, and nothing of the
// kernel, and is what every part that balances, shows or proves Services starts from.
//
// Sources: https://kubernetes.io/docs/reference/networking/virtual-ips/, KEP-1669 (terminating endpoints), KEP-2086
// (internalTrafficPolicy), KEP-4444 (trafficDistribution).
package service

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Name is a Service's namespace and name.
type Name struct{ Namespace, Name string }

// String returns the name as in the API's messages, "default/web".
func (n Name) String() string { return n.Namespace + "/" + n.Name }

// Compare orders names by namespace, then by name.
func (n Name) Compare(o Name) int {
	return cmp.Or(strings.Compare(n.Namespace, o.Namespace), strings.Compare(n.Name, o.Name))
}

// Protocol is an IP protocol number.
type Protocol uint8

// The protocols that a port of a Service can have.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// String returns the protocol's name as in the API, "TCP".
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Kind says by which of a Service's addresses a frontend is met.
type Kind uint8

// The kinds of frontends.
const (
	ClusterIP Kind = iota
	ExternalIP
	LoadBalancer
	NodePort
)

// String returns the kind as in the API, "ClusterIP".
func (k Kind) String() string {
	return [...]string{"ClusterIP", "ExternalIP", "LoadBalancer", "NodePort"}[k]
}

// Key is what packets meet a frontend by; there is one frontend for a key on a node.
type Key struct {
	// Addr is the address. A NodePort's is 0.0.0.0 or ::, which stand for every address of the family that the node
	// is met at from outside (Plan.NodePortAddrs) and for loopback addresses.
	Addr     netip.Addr
	Protocol Protocol
	Port     uint16
}

// String returns the key as people write it, "10.96.0.10:53/UDP".
func (k Key) String() string {
	return netip.AddrPortFrom(k.Addr, k.Port).String() + "/" + k.Protocol.String()
}

// Compare orders keys by address, port and protocol.
func (k Key) Compare(o Key) int {
	return cmp.Or(k.Addr.Compare(o.Addr), cmp.Compare(k.Port, o.Port), cmp.Compare(k.Protocol, o.Protocol))
}

// Frontend is an address and port of a Service and where the node sends what comes to it.
type Frontend struct {
	Key
	Service  Name
	PortName string // as in the Service; empty if it has no name
	Kind     Kind
	// Inside is for what starts on this node or in one of its pods, Outside for all else. They differ with
	// externalTrafficPolicy: Local, which is about what comes from outside. Both are sorted and without duplicates.
	Inside, Outside Backends
	// Affinity is how long a client stays with an endpoint after its last connection (sessionAffinity: ClientIP); zero
	// is no affinity. A client has one endpoint for all frontends of a Service, as far as they have it.
	Affinity time.Duration
	// Sources are who may come (loadBalancerSourceRanges), of the address's family; nil is everyone. Others are dropped.
	Sources []netip.Prefix
	// PodsOnly says that processes in the node's own network namespace do not meet the frontend: what they send there
	// goes to whoever has the address outside of the cluster.
	PodsOnly bool
}

// Backends are the endpoints that a frontend may send to, and what becomes of a packet if there are none.
type Backends struct {
	Endpoints []netip.AddrPort
	// Drop says that without endpoints here packets are dropped, for there are some on other nodes (a traffic policy
	// of Local), and whoever balances before us shall see no answer. Otherwise they are rejected.
	Drop bool
}

// Equal says whether two are the same.
func (b Backends) Equal(o Backends) bool {
	return b.Drop == o.Drop && slices.Equal(b.Endpoints, o.Endpoints)
}

// Split says whether it matters where a client is.
func (f Frontend) Split() bool { return !f.Inside.Equal(f.Outside) }

// Equal says whether two frontends are the same in all.
func (f Frontend) Equal(o Frontend) bool {
	return f.Key == o.Key && f.Service == o.Service && f.PortName == o.PortName && f.Kind == o.Kind && f.Affinity == o.Affinity && f.PodsOnly == o.PodsOnly &&
		(f.Sources == nil) == (o.Sources == nil) && slices.Equal(f.Sources, o.Sources) && f.Inside.Equal(o.Inside) && f.Outside.Equal(o.Outside)
}

// ID is the number that stands for a Service in the kernel where affinity is kept. It follows from the name, so that
// agents that come and go agree on it. Two Services with one ID cost affinity, not correctness: an endpoint that a
// frontend does not have is never used.
func ID(name Name) uint32 {
	h := fnv.New32a()
	h.Write([]byte(name.String()))
	return h.Sum32()
}

// Plan is all that a node's kernel should hold of Services.
type Plan struct {
	// Frontends are sorted by their keys, each of which is there once.
	Frontends []Frontend
	// NodePortAddrs are the node's addresses at which NodePorts answer, sorted; besides them loopback addresses do, for what
	// starts on the node itself: those of IPv6 to sockets alone.
	NodePortAddrs []netip.Addr
	// OwnPods are the addresses of the node's own pods. Who comes from there, or from the node itself, is inside; pods of
	// other nodes have met what they ask for on their own node, or mean this node. What goes to them needs no masquerade:
	// the answer comes by here.
	OwnPods []netip.Prefix
}

// Change is what has become of the frontends of one Service. Frontends of one key are in both if they changed. An old
// one is another Service's if the key was that one's before.
type Change struct {
	Service  Name
	Old, New []Frontend
}
