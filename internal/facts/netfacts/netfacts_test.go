package netfacts_test

import (
	"fmt"
	"maps"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

func node(name, address, cidr string, annotations map[string]string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotations},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{cidr}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
			{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeExternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeInternalIP, Address: address}}},
	}
}

func TestRead(t *testing.T) {
	c := netconf.Default()
	c.Mode = podnet.VXLAN
	vxlan := map[string]string{netfacts.ModeAnnotation: "vxlan", netfacts.TunnelAnnotation: "4242:4789"}
	f := netfacts.Read([]*corev1.Node{
		node("a", "10.0.0.1", "10.244.0.0/24", nil),
		node("b", "10.0.0.2", "10.244.1.0/24", vxlan),
		node("c", "10.0.0.3", "10.244.2.0/24", map[string]string{netfacts.TunnelAnnotation: "7:4789"}),
		node("d", "10.0.0.x", "10.244.3.0", nil),
	}, "a", c)
	if f.Own.Name != "a" || len(f.Nodes) != 4 || f.Nodes[0].Addrs[0].String() != "10.0.0.1" || len(f.Nodes[0].Addrs) != 1 {
		t.Errorf("%+v", f)
	}
	for i, down := range []bool{true, false, true, true} {
		if f.Nodes[i].TunnelDown != down {
			t.Errorf("%s: tunnel down %v", f.Nodes[i].Name, !down)
		}
	}
	if len(f.Problems) != 2 || f.Problems[0].Node != "d" {
		t.Errorf("problems %v", f.Problems)
	}
	if !f.Config.Standby {
		t.Error("b sends by vxlan, and a would not receive it")
	}
	if f := netfacts.Read([]*corev1.Node{node("a", "10.0.0.1", "10.244.0.0/24", vxlan)}, "a", c); f.Config.Standby {
		t.Error("what a node sends by itself is no reason to receive")
	}
}

func TestReadOldPodCIDR(t *testing.T) {
	n := node("a", "10.0.0.1", "", nil)
	n.Spec.PodCIDRs, n.Spec.PodCIDR = nil, "10.244.0.0/24"
	if f := netfacts.Read([]*corev1.Node{n}, "a", netconf.Default()); len(f.Own.PodCIDRs) != 1 {
		t.Errorf("%+v", f)
	}
}

func TestAnnouncement(t *testing.T) {
	plan := podnet.Plan{Mode: podnet.VXLAN}
	if got, want := netfacts.Announcement(plan), map[string]string{netfacts.ModeAnnotation: "vxlan", netfacts.TunnelAnnotation: "none"}; !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	plan.Tunnel = &podnet.Tunnel{VNI: 7, Port: 8472}
	if got := netfacts.Announcement(plan)[netfacts.TunnelAnnotation]; got != "7:8472" {
		t.Errorf("%s", got)
	}
}

// BenchmarkRead reads a cluster of a thousand nodes.
func BenchmarkRead(b *testing.B) {
	c := netconf.Default()
	var nodes []*corev1.Node
	for i := range 1000 {
		nodes = append(nodes, node(fmt.Sprintf("n%d", i), fmt.Sprintf("10.1.%d.%d", i/250, i%250+1), fmt.Sprintf("10.%d.%d.0/24", 64+i/250, i%250), nil))
	}
	b.ReportAllocs()
	for b.Loop() {
		netfacts.Read(nodes, "n1", c)
	}
}
