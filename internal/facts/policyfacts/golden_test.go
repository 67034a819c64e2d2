package policyfacts_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/testenv/golden"
)

// TestGolden: what the kernels of nodes have to know of a cluster's policies.
func TestGolden(t *testing.T) {
	golden.Run(t, func(in golden.Objects) string {
		var b strings.Builder
		for _, node := range []string{"node1", "node2"} {
			m := policy.NewModel(node)
			for _, n := range in.Namespaces {
				m.SetNamespace(n.Name, n.Labels)
			}
			for _, p := range in.NetworkPolicies {
				m.SetPolicy(policyfacts.NetworkPolicy(p))
			}
			for _, p := range in.Pods {
				setPod(m, p)
			}
			fmt.Fprintf(&b, "%s\n", node)
			writeFacts(&b, m)
		}
		return b.String()
	})
}

func writeFacts(b *strings.Builder, m *policy.Model) {
	f, names := m.Facts(), m.Identities()
	names[0] = "anyone"
	for _, n := range slices.Sorted(maps.Keys(names)) {
		fmt.Fprintf(b, "  identity %x: %s\n", n, names[n])
	}
	for _, a := range slices.SortedFunc(maps.Keys(f.Addrs), netip.Addr.Compare) {
		is := f.Addrs[a]
		fmt.Fprintf(b, "  address %s: identity %x", a, is.Peer)
		if is.Own {
			fmt.Fprintf(b, ", own pod, ingress class %x, egress class %x", is.Isolated[policy.Ingress], is.Isolated[policy.Egress])
		}
		fmt.Fprintln(b)
	}
	for _, n := range slices.Sorted(maps.Keys(f.Classes)) {
		c := f.Classes[n]
		fmt.Fprintf(b, "  class %x: %s, isolated by %v\n", n, c.Direction, c.Policies)
		for _, a := range c.Allows {
			fmt.Fprintf(b, "    %s with identity %x: by %s\n", grant(a.Grant), a.Peer, a.By)
		}
		for _, a := range c.Blocks {
			fmt.Fprintf(b, "    %s with %s to %s: by %s\n", grant(a.Grant), a.First, a.Last, a.By)
		}
	}
}

func grant(g policy.Grant) string {
	if g.All {
		return "everything"
	}
	return fmt.Sprintf("%s %d-%d", g.Protocol, g.From, g.To)
}
