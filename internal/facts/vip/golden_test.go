package vip_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/testenv/golden"
)

// TestGolden: what becomes of AddressPools, and which addresses Services have of them.
func TestGolden(t *testing.T) {
	golden.Run(t, func(in golden.Objects) string {
		var b strings.Builder
		pools := vip.Read(vip.Objects{Pools: in.AddressPools, Nodes: in.Nodes, Services: in.ServiceCIDRs, PodPools: in.IPPools})
		namespaces := map[string]labels.Set{}
		for _, n := range in.Namespaces {
			namespaces[n.Name] = n.Labels
		}
		assigned := pools.Assign(in.Services, namespaces)
		for i := range pools {
			p := &pools[i]
			status, _ := p.Status(assigned, time.Time{})
			fmt.Fprintf(&b, "pool %s: %s\n", p.Name, p.Ranges)
			if u := status.IPv4; u != nil {
				fmt.Fprintf(&b, "  IPv4: %d of %d assigned\n", u.Assigned, u.Addresses)
			}
			if u := status.IPv6; u != nil {
				fmt.Fprintf(&b, "  IPv6: %d of %d assigned\n", u.Assigned, u.Addresses)
			}
			valid := meta.FindStatusCondition(status.Conditions, v1alpha1.PoolValid)
			fmt.Fprintf(&b, "  %d Services, valid %s: %s: %s\n", status.Services, valid.Status, valid.Reason, valid.Message)
		}
		for _, a := range assigned {
			fmt.Fprintf(&b, "Service %s: %s of %s", a.Service, a.Addresses, a.Pools)
			if a.Reason != "" {
				fmt.Fprintf(&b, ", %s: %s", a.Reason, a.Text)
			}
			fmt.Fprintln(&b)
		}
		return b.String()
	})
}
