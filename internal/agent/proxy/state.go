package proxy

import (
	"context"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// State is what a node's kernel was found to do with Services.
type State struct {
	Status
	Config Config
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
	// Flows are what connection tracking remembers of UDP and SCTP to Services' addresses.
	Flows []Flows
}

// Redirect returns how the state differs from what Services alone would have it.
func (s State) Redirect() *service.Redirect {
	r := &service.Redirect{Service: clusterDNS, Port: service.DNSPort}
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

// State reads the kernel. It may be called while the proxy runs.
func (p *Proxy) State(ctx context.Context) (State, error) {
	p.mu.Lock()
	s := State{Status: p.status, Config: p.config, ConnectMissing: p.missing}
	connect := p.connect
	p.mu.Unlock()
	if r := p.redirected.Load(); r != nil {
		s.NodeCaches = r.Addrs()
	}
	rules, err := ruleset.Open(ownNetNS) // the proxy's is for its loop alone
	if err != nil {
		return s, err
	}
	defer rules.Close()
	if s.NFTables, err = rules.Services(); err != nil {
		return s, err
	}
	if p.Loopback != nil {
		if s.Loopback, err = p.Loopback.Routed(); err != nil {
			return s, err
		}
	}
	if connect != nil {
		if s.Connect, err = connect.Frontends(); err != nil {
			return s, err
		}
		if s.Detached, err = connect.Detached(); err != nil {
			return s, err
		}
	}
	s.Flows, err = flowsTo(ctx, service.NewIndex(s.NFTables, nil, nil), s.Config.ServiceCIDRs)
	return s, err
}

// flowsTo counts the flows to frontends, and to what is or was a Service's address.
func flowsTo(ctx context.Context, index *service.Index, ranges []netip.Prefix) ([]Flows, error) {
	table, err := conntrack.OpenTable(ownNetNS)
	if err != nil {
		return nil, err
	}
	defer table.Close()
	number := map[Flows]int{}
	err = table.Entries(ctx, conntrack.Filter{Protocols: []service.Protocol{service.UDP, service.SCTP}}, func(e conntrack.Entry) error {
		to := e.Original.Destination
		_, found := index.Find(e.Protocol, to)
		if found || slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(to.Addr()) }) {
			number[Flows{Protocol: e.Protocol, To: to, Answers: e.Reply.Source, Translated: e.Status&conntrack.DNAT != 0}]++
		}
		return nil
	})
	all := make([]Flows, 0, len(number))
	for f, n := range number {
		f.Number = n
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b Flows) int { return a.To.Compare(b.To) })
	return all, err
}
