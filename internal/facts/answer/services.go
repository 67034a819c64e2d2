package answer

import (
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Services is an agent's report on Services: what its kernel holds for them.
type Services struct {
	ProxyStatus
	Config ProxyConfig
	// NFTables is what nftables balances.
	NFTables service.Plan
	// Connect is what the programs at connect() balance. Detached are the programs that should be attached and are not.
	// ConnectMissing is why nothing is balanced at connect().
	Connect        []service.Balanced
	Detached       []string `json:",omitempty"`
	ConnectMissing string   `json:",omitempty"`
	// Loopback says that the node routes 127.0.0.0/8. NodePorts by nftables answer at loopback addresses only then.
	Loopback bool
	// NodeCaches are the addresses of the node's DNS cache, which answers instead of the cluster's servers.
	NodeCaches []netip.Addr `json:",omitempty"`
	// Unserved are the addresses at which the node rejects packets that are for no Service, in the form of service.UnservedAsHeld.
	// It is nil if the table is missing or has unexpected rules. The agent adds it.
	Unserved *service.Unserved `json:",omitempty"`
	// Balancers is the report on load balancers' addresses and external IPs. The agent adds it.
	Balancers *Balancers `json:",omitempty"`
	// Flows are the UDP and SCTP flows to Services' addresses in connection tracking.
	Flows []Flows
}

// Redirect returns the redirection of the cluster's DNS to the node's DNS cache.
func (s Services) Redirect() *service.Redirect {
	r := &service.Redirect{Service: service.ClusterDNS, Port: service.DNSPort}
	r.Set(s.NodeCaches)
	return r
}

// Flows is a number of flows with the same destination and the same endpoint.
type Flows struct {
	Protocol    service.Protocol
	To, Answers netip.AddrPort
	Translated  bool
	Number      int
}

// ProxyConfig is what the agent passes to its proxy about the node and the configuration, each time it changes.
type ProxyConfig struct {
	Mode netconf.ServiceProxy
	Node service.Node
	// NodePortAddrs and OwnPods are those of service.Plan.
	NodePortAddrs []netip.Addr
	OwnPods       []netip.Prefix
	// ServiceCIDRs are the ranges of the cluster's ClusterIPs.
	ServiceCIDRs []netip.Prefix
	// Announce makes the proxy watch Services for LoadBalancers, even if another proxy carries them.
	Announce bool
	// NodeCaches are the addresses of the node's own DNS cache, sorted. While it answers, it gets the questions to the cluster's
	// DNS from this node.
	NodeCaches []netip.Addr
	// ExternalIPs and ExternalIPsFor are the configuration's settings. SetExternalIPs applies them.
	ExternalIPs    netconf.ExternalIPs
	ExternalIPsFor netconf.ExternalIPsFor
	// APIServer is the address at which this node reaches the API server, if it is known as one.
	APIServer netip.Addr
}

// ProxyStatus is the state of a proxy.
type ProxyStatus struct {
	// Ready says that the kernel has held all Services at least once. If it lags behind later, Problem says why, and connections
	// follow the last known state. Rejected: not to be Ready then, since the node would take no more pods.
	Ready   bool
	Problem string // why it is not ready, or why it lags behind
}
