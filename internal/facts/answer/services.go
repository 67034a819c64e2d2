package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Services is what an agent says of Services: what its kernel was found to do with them.
type Services struct {
	ProxyStatus
	Config ProxyConfig
	// NFTables is what nftables balances.
	NFTables service.Plan
	// Connect is what is balanced when something on the node connects, Detached the programs that should be attached for
	// it and are not, and ConnectMissing why nothing is balanced so.
	Connect        []service.Balanced
	Detached       []string `json:",omitempty"`
	ConnectMissing string   `json:",omitempty"`
	// Loopback says that the node routes 127.0.0.0/8, without which NodePorts do not answer there by nftables.
	Loopback bool
	// NodeCaches are the addresses of the node's DNS cache that is asked in the place of the cluster's servers.
	NodeCaches []netip.Addr `json:",omitempty"`
	// Unserved is where what is for no Service is refused, as service.UnservedAsHeld has it; nil if the table is not there, or
	// not as it should be. The agent adds it.
	Unserved *service.Unserved `json:",omitempty"`
	// Balancers is what the agent does about load balancers' addresses and external IPs. The agent adds it.
	Balancers *Balancers `json:",omitempty"`
	// Flows are what connection tracking remembers of UDP and SCTP to Services' addresses.
	Flows []Flows
}

// Redirect returns how it differs from what Services alone would have it.
func (s Services) Redirect() *service.Redirect {
	r := &service.Redirect{Service: service.ClusterDNS, Port: service.DNSPort}
	r.Set(s.NodeCaches)
	return r
}

// Flows are flows that go the same way.
type Flows struct {
	Protocol    service.Protocol
	To, Answers netip.AddrPort
	Translated  bool
	Number      int
}

// ProxyConfig is what a proxy is told by who knows the node, as often as it changes.
type ProxyConfig struct {
	Mode netconf.ServiceProxy
	Node service.Node
	// What a service.Plan has besides frontends.
	NodePortAddrs []netip.Addr
	OwnPods       []netip.Prefix
	// ServiceCIDRs are where the cluster's Services have their addresses.
	ServiceCIDRs []netip.Prefix
	// Announce has Services followed for LoadBalancers, even if another proxy carries them.
	Announce bool
	// NodeCaches are the addresses of the node's own DNS cache, sorted. Who asks the cluster's DNS on this node asks it
	// while it answers.
	NodeCaches []netip.Addr
	// ExternalIPs and ExternalIPsFor are the configuration's; SetExternalIPs says what follows from them.
	ExternalIPs    netconf.ExternalIPs
	ExternalIPsFor netconf.ExternalIPsFor
	// APIServer is the address at which this node reaches the API server, if it is known as one.
	APIServer netip.Addr
}

// ProxyStatus is how far a proxy is.
type ProxyStatus struct {
	// Ready says that the kernel has held all Services once. It may lag behind since: then there is a Problem, and
	// connections go where the last known state leads, which is better than to have the node take no pods.
	Ready   bool
	Problem string // why it is not ready, or why it lags behind
}
