package proxy

import (
	"context"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// State reads the kernel. It may be called while the proxy runs.
func (p *Proxy) State(ctx context.Context) (answer.Services, error) {
	p.mu.Lock()
	s := answer.Services{ProxyStatus: p.status, Config: p.config, ConnectMissing: p.missing}
	connect := p.connect
	p.mu.Unlock()
	if r := p.redirected.Load(); r != nil {
		s.NodeCaches = r.Addrs()
	}
	rules, err := ruleset.Open(link.OwnNetNS) // only the proxy's loop may use the proxy's
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

// flowsTo counts the flows to frontends, and to addresses in the Services' ranges that no frontend has (any more).
func flowsTo(ctx context.Context, index *service.Index, ranges []netip.Prefix) ([]answer.Flows, error) {
	table, err := conntrack.OpenTable(link.OwnNetNS)
	if err != nil {
		return nil, err
	}
	defer table.Close()
	number := map[answer.Flows]int{}
	err = table.Entries(ctx, conntrack.Filter{Protocols: []service.Protocol{service.UDP, service.SCTP}}, func(e conntrack.Entry) error {
		to := e.Original.Destination
		_, found := index.Find(e.Protocol, to)
		if found || inet.Contains(ranges, to.Addr()) {
			number[answer.Flows{Protocol: e.Protocol, To: to, Answers: e.Reply.Source, Translated: e.Status&conntrack.DNAT != 0}]++
		}
		return nil
	})
	all := make([]answer.Flows, 0, len(number))
	for f, n := range number {
		f.Number = n
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b answer.Flows) int { return a.To.Compare(b.To) })
	return all, err
}
