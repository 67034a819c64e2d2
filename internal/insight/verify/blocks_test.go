package verify

import (
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
)

func TestBlocks(t *testing.T) {
	block := func(cidr, node string) *v1alpha1.IPBlock {
		return &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(netip.MustParsePrefix(cidr))}, Spec: v1alpha1.IPBlockSpec{Pool: "p", CIDR: cidr, Node: node}}
	}
	c := Cluster{Blocks: []*v1alpha1.IPBlock{block("10.50.0.0/26", "a"), block("10.50.0.64/26", "b"), block("10.50.0.7/32", "b"), block("10.96.0.0/12", "a"), block("10.50.1.0/26", "gone")},
		Pools: []*v1alpha1.IPPool{{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: v1alpha1.IPPoolSpec{IPv4: &v1alpha1.IPPoolRange{CIDR: "10.50.0.0/16"}}}}}
	c.Blocks[2].Spec.Fixed = true
	for _, name := range []string{"a", "b"} {
		c.Nodes = append(c.Nodes, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name)}})
	}
	var found []string
	for _, d := range Blocks(c) {
		found = append(found, d.Node+": "+d.Text)
	}
	want := `b: IPBlock 10.50.0.7-32 of pool "p" on node b is not used: it overlaps 10.50.0.0/26 of node a, which was there first; ` +
		`a: IPBlock 10.96.0.0-12 of pool "p" on node a is not used: it is not within 10.50.0.0/16, which the pool has; ` +
		"gone: block 10.50.1.0/26 of pool p belongs to a node that does not exist"
	if got := strings.Join(found, "; "); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}

	d := differ{node: "a"}
	d.blocks(c.pools(), answer.Node{
		Leases: []answer.Lease{
			{Namespace: "n", Pod: "in", Pool: "p", Addresses: []netip.Addr{netip.MustParseAddr("10.50.0.9")}},
			{Namespace: "n", Pod: "out", Pool: "p", Addresses: []netip.Addr{netip.MustParseAddr("10.50.0.70")}},
			{Namespace: "n", Pod: "own", Pool: "default", Addresses: []netip.Addr{netip.MustParseAddr("10.244.0.70")}},
		},
		Pools: []ipam.Pool{{Name: "p", Ranges: []netip.Prefix{netip.MustParsePrefix("10.50.0.0/26"), netip.MustParsePrefix("10.50.1.0/26")}}},
	})
	found = nil
	for _, x := range d.found {
		found = append(found, x.Text)
	}
	want = "pod n/out has 10.50.0.70 of pool p, which is in no block of the node; addresses of 10.50.1.0/26 are assigned, which is not a block of the node"
	if got := strings.Join(found, "; "); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
}
