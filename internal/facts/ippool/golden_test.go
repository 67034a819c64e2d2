package ippool_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/testenv/golden"
)

// TestGolden: what becomes of IPPools and IPBlocks, and what the pods of a file, none of which has an address yet, get on their
// nodes: an address that they ask for, or one of a block, which the node has or has to take.
func TestGolden(t *testing.T) {
	golden.Run(t, func(in golden.Objects) string {
		var b strings.Builder
		f := ippool.Read(ippool.Objects{Pools: in.IPPools, Blocks: in.IPBlocks, Nodes: in.Nodes, Services: in.ServiceCIDRs, AddressPools: in.AddressPools})
		for _, p := range f.Pools {
			status, _ := f.Status(p, time.Time{})
			fmt.Fprintf(&b, "pool %s:", p.Name)
			for _, r := range p.Ranges {
				fmt.Fprintf(&b, " %s in blocks of /%d", r.Prefix, r.BlockBits)
			}
			fmt.Fprintln(&b)
			for _, u := range []*v1alpha1.IPPoolUsage{status.IPv4, status.IPv6} {
				if u != nil {
					fmt.Fprintf(&b, "  %d of %d addresses in %d blocks\n", u.Taken, u.Addresses, u.Blocks)
				}
			}
			valid := meta.FindStatusCondition(status.Conditions, v1alpha1.PoolValid)
			fmt.Fprintf(&b, "  %d nodes, valid %s: %s: %s\n", status.Nodes, valid.Status, valid.Reason, valid.Message)
		}
		for _, x := range f.Blocks {
			fmt.Fprintf(&b, "block %s of %s is node %s's, fixed %v\n", x.Prefix, x.Pool, x.Node, x.Fixed)
		}
		for _, r := range f.Refused {
			fmt.Fprintf(&b, "refused, %s: %s\n", r.Reason, r)
		}
		for _, pod := range in.Pods {
			fmt.Fprintf(&b, "pod %s/%s on %s: ", pod.Namespace, pod.Name, pod.Spec.NodeName)
			var ns struct{ annotations, labels map[string]string }
			for _, n := range in.Namespaces {
				if n.Name == pod.Namespace {
					ns.annotations, ns.labels = n.Annotations, n.Labels
				}
			}
			wish, err := ippool.ParseWish(pod.Annotations, ns.annotations)
			var grant ippool.Grant
			if err == nil {
				grant, err = f.Decide(wish, pod.Spec.NodeName, pod.Namespace, ns.labels)
			}
			if err != nil {
				fmt.Fprintf(&b, "refused: %v\n", err)
				continue
			}
			fmt.Fprintf(&b, "pool %q", grant.Pool)
			if len(grant.Addresses) > 0 {
				fmt.Fprintf(&b, ", addresses %s, of which it takes %s", grant.Addresses, grant.Fixed)
			}
			for _, r := range grant.Ordinary {
				fmt.Fprintf(&b, ", %s", ordinary(f, grant.Pool, r, pod.Spec.NodeName))
			}
			fmt.Fprintln(&b)
		}
		return b.String()
	})
}

// ordinary says of which block a node gives an address of a range.
func ordinary(f ippool.Facts, pool string, r ippool.Range, node string) string {
	for _, x := range f.Of(node) {
		if x.Pool == pool && !x.Fixed && r.Overlaps(x.Prefix) {
			return fmt.Sprintf("an address of its block %s", x.Prefix)
		}
	}
	if _, found := ippool.FreeBlock(r, f.Taken(), node); found {
		return fmt.Sprintf("an address of %s, of which it takes a block", r.Prefix)
	}
	return f.Full(ippool.Need{Pool: pool, Range: r}, 0, 0, 0).Error()
}
