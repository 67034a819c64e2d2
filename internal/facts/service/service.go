// Package service defines what Services mean on one node: at which addresses and ports they are reached there, and to which
// endpoints their traffic may go. It knows neither the API's objects, which svcfacts reads, nor the kernel. Every part that
// balances, shows or verifies Services starts from it.
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

// Kind is the kind of a frontend's address.
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

// Key identifies a frontend by its destination; a node has one frontend for a key.
type Key struct {
	// Addr is the address. A NodePort's is 0.0.0.0 or ::, which stand for every address of the family at which the node
	// answers from outside (Plan.NodePortAddrs) and for loopback addresses.
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

// Frontend is an address and port of a Service, and where the node sends their traffic.
type Frontend struct {
	Key
	Service  Name
	PortName string // as in the Service; empty if it has no name
	Kind     Kind
	// Inside is for clients on this node or in its pods, Outside for all others. They differ with externalTrafficPolicy:
	// Local, which applies to traffic from outside. Both are sorted and without duplicates.
	Inside, Outside Backends
	// Affinity is how long a client stays with an endpoint after its last connection (sessionAffinity: ClientIP); zero
	// is no affinity. A client has one endpoint for all frontends of a Service, as far as they have it.
	Affinity time.Duration
	// Sources are the permitted clients (loadBalancerSourceRanges), of the address's family; nil permits all. Others are
	// dropped.
	Sources []netip.Prefix
	// PodsOnly means that the frontend is not for processes in the node's own network namespace: their packets go to the
	// machine that has the address outside of the cluster.
	PodsOnly bool
}

// Backends are the endpoints that a frontend may send to, and what happens to a packet if there are none.
type Backends struct {
	Endpoints []netip.AddrPort
	// Drop means that packets are dropped if there are no endpoints here, because there are some on other nodes (a traffic
	// policy of Local), so that a load balancer in front gets no answer. Otherwise they are rejected.
	Drop bool
}

// Equal says whether two are the same.
func (b Backends) Equal(o Backends) bool {
	return b.Drop == o.Drop && slices.Equal(b.Endpoints, o.Endpoints)
}

// Split reports whether clients inside and outside differ in their backends.
func (f Frontend) Split() bool { return !f.Inside.Equal(f.Outside) }

// Equal reports whether two frontends are equal.
func (f Frontend) Equal(o Frontend) bool {
	return f.Key == o.Key && f.Service == o.Service && f.PortName == o.PortName && f.Kind == o.Kind && f.Affinity == o.Affinity && f.PodsOnly == o.PodsOnly &&
		(f.Sources == nil) == (o.Sources == nil) && slices.Equal(f.Sources, o.Sources) && f.Inside.Equal(o.Inside) && f.Outside.Equal(o.Outside)
}

// ID returns the number by which the kernel's affinity maps refer to a Service. It is a hash of the name, so that an agent that
// restarts computes the same one. A collision of two Services costs affinity, not correctness: the kernel never uses an
// endpoint that a frontend does not have.
func ID(name Name) uint32 {
	h := fnv.New32a()
	h.Write([]byte(name.String()))
	return h.Sum32()
}

// Plan is everything that a node's kernel should hold of Services.
type Plan struct {
	// Frontends are sorted by their keys, each of which is there once.
	Frontends []Frontend
	// NodePortAddrs are the node's addresses at which NodePorts answer, sorted. Loopback addresses answer, too, for processes on the
	// node itself; the IPv6 one answers at connect() only.
	NodePortAddrs []netip.Addr
	// OwnPods are the addresses of the node's own pods. Clients at these addresses, and the node itself, are inside. Packets from
	// pods of other nodes have been translated on their own node, or are addressed to this node. Packets to OwnPods need no
	// masquerade, since their answers pass this node.
	OwnPods []netip.Prefix
}

// Change is the change of one Service's frontends. A frontend that changed is in both lists under its key. An old frontend
// may be another Service's, if that one had the key before.
type Change struct {
	Service  Name
	Old, New []Frontend
}
