package service

import (
	"net/netip"
	"time"
	"unique"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// LabelProxyName labels a Service that another proxy than the cluster's carries.
const LabelProxyName = "service.kubernetes.io/service-proxy-name"

// Service is what a Model needs to know of a Service of the API.
type Service struct {
	Name    Name
	Created int64 // in seconds, as the API has it
	Labels  map[string]string
	Ports   []Port
	// Addrs are the addresses that are balanced here, each once. There are none if another proxy carries the Service.
	Addrs []Address
	// ClusterIPs and BalancerIPs are addresses that no other Service may have as an external IP, also where another proxy
	// carries this one.
	ClusterIPs, BalancerIPs   []netip.Addr
	Serves                    inet.Each[bool]
	LocalInside, LocalOutside bool // internalTrafficPolicy and externalTrafficPolicy are Local
	Affinity                  time.Duration
	Sources                   inet.Each[[]netip.Prefix] // nil is everyone
	HealthPort                uint16                    // 0 is none
	Problems                  []string
}

// Port is a port of a Service.
type Port struct {
	Name     string
	ID       unique.Handle[string] // of the name, to compare it with a slice's
	Protocol Protocol
	Number   uint16
	NodePort uint16 // 0 is none
}

// Address is one of a Service's addresses. A NodePort's is 0.0.0.0 or ::.
type Address struct {
	Addr netip.Addr
	Kind Kind
}

// Slice is what a Model needs to know of an EndpointSlice.
type Slice struct {
	Name      Name // its own
	Of        Name // its Service; the zero Name if no frontend could use it
	Family    inet.Family
	Ports     []SlicePort
	Endpoints []Endpoint
}

// SlicePort is a port of an EndpointSlice.
type SlicePort struct {
	Name     unique.Handle[string]
	Protocol Protocol
	Number   uint16
}

// Endpoint is one of 100,000 in a large cluster, so what many share is there once.
type Endpoint struct {
	Addr  netip.Addr
	Node  unique.Handle[string] // the zero handle if it names none
	Hints unique.Handle[Hints]  // the zero handle if it has none
	Condition
}

// Condition is what an EndpointSlice says of an endpoint's pod.
type Condition struct{ Ready, Serving, Terminating bool }

// Hints are the zones and nodes whose clients an endpoint is meant for, with commas between.
type Hints struct{ Zones, Nodes string }
