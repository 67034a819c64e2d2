package svcfacts_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/testenv/golden"
)

// TestGolden: what Services are on each node of a cluster, and what is said of each endpoint there. External IPs are off, as
// they are in a cluster that was not configured otherwise.
func TestGolden(t *testing.T) {
	golden.Run(t, func(in golden.Objects) string {
		var b strings.Builder
		m := service.NewModel(service.Node{})
		m.SetClusterIPs(true)
		m.Replace(svcfacts.Services(in.Services), svcfacts.Slices(in.EndpointSlices))
		for _, n := range in.Nodes {
			node := svcfacts.Node(n)
			m.SetNode(node)
			fmt.Fprintf(&b, "node %s, zone %q, %s\n", node.Name, node.Zone, node.Addrs)
			for _, f := range m.Frontends() {
				writeFrontend(&b, f)
			}
			for _, h := range m.HealthChecks() {
				fmt.Fprintf(&b, "  health check of %s at port %d: %d local endpoints\n", h.Service, h.Port, h.LocalEndpoints)
			}
			for _, s := range in.Services {
				for _, u := range svcfacts.Explain(s, in.EndpointSlices, node) {
					fmt.Fprintf(&b, "  endpoint %s of %s/%s, slice %s: inside %v, outside %v", u.Addr, s.Namespace, s.Name, u.Slice, u.Inside, u.Outside)
					if u.Why != "" {
						fmt.Fprintf(&b, ": %s", u.Why)
					}
					fmt.Fprintln(&b)
				}
			}
		}
		balancers, _ := m.LoadBalancers()
		for _, l := range balancers {
			fmt.Fprintf(&b, "announced of %s: load balancer %s, external %s", l.Service, l.Addrs, l.ExternalIPs)
			if l.Local {
				fmt.Fprintf(&b, ", to nodes %s alone", l.Nodes)
			}
			fmt.Fprintf(&b, ", cluster %s", l.ClusterIPs)
			if l.LocalInside {
				fmt.Fprintf(&b, ", to nodes %s alone", l.NodesInside)
			}
			fmt.Fprintln(&b)
		}
		for _, s := range in.Services {
			if foreign := svcfacts.ForeignAddrs(s); foreign != nil {
				fmt.Fprintf(&b, "of another proxy: %s/%s %s\n", s.Namespace, s.Name, foreign)
			}
		}
		for _, p := range m.Problems() {
			fmt.Fprintf(&b, "problem: %s", p)
			if p.Refused {
				fmt.Fprint(&b, " (by the cluster's policy)")
			}
			fmt.Fprintln(&b)
		}
		return b.String()
	})
}

func writeFrontend(b *strings.Builder, f service.Frontend) {
	fmt.Fprintf(b, "  %s %s of %s", f.Key, f.Kind, f.Service)
	if f.PortName != "" {
		fmt.Fprintf(b, " port %s", f.PortName)
	}
	if f.Affinity > 0 {
		fmt.Fprintf(b, ", affinity %s", f.Affinity)
	}
	if f.Sources != nil {
		fmt.Fprintf(b, ", from %s alone", f.Sources)
	}
	if f.PodsOnly {
		fmt.Fprint(b, ", for pods alone")
	}
	if !f.Split() {
		fmt.Fprintf(b, ": %s\n", backends(f.Inside))
		return
	}
	fmt.Fprintf(b, ": inside %s, outside %s\n", backends(f.Inside), backends(f.Outside))
}

func backends(s service.Backends) string {
	switch {
	case len(s.Endpoints) > 0:
		return fmt.Sprint([]netip.AddrPort(s.Endpoints))
	case s.Drop:
		return "dropped"
	}
	return "rejected"
}
