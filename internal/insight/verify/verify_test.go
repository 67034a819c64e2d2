package verify_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/insight/verify"
)

func addrs(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

// cluster has two nodes, a and b, and a pod web on a.
func cluster() verify.Cluster {
	node := func(name, address, cidr string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{cidr}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}}}
	}
	return verify.Cluster{
		Nodes: []*corev1.Node{node("a", "10.0.0.1", "10.244.0.0/24"), node("b", "10.0.0.2", "10.244.1.0/24")},
		Pods:  []*corev1.Pod{pod("web", "u1", "10.244.0.2")},
	}
}

func pod(name, uid, ip string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(uid)}, Spec: corev1.PodSpec{NodeName: "a"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip}}}}
}

// state is what node a holds when all is well.
func state(t testing.TB, c verify.Cluster) answer.Node {
	t.Helper()
	s := answer.Node{Status: answer.Status{Ready: true, Config: netconf.Default(),
		Interfaces: []podnet.Interface{{Name: "eth0", MTU: 1500, Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}}}}}
	f := netfacts.Read(c.Nodes, "a", s.Config)
	plan, problems := podnet.NewPlan("a", s.Interfaces, f.Nodes, f.Config)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	s.Kernel = plan.State
	s.Leases = []answer.Lease{{Namespace: "default", Pod: "web", UID: "u1", Device: "web-abcde", Pool: netconf.DefaultPool, Addresses: addrs("10.244.0.2")}}
	s.Pods = []podnet.PodEnd{{Device: "web-abcde", MTU: 1500, Routes: addrs("10.244.0.2"), Neighbours: addrs("10.244.0.2")}}
	return s
}

func TestPods(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*verify.Cluster, *answer.Node)
		want   []string
	}{
		"nothing": {func(*verify.Cluster, *answer.Node) {}, nil},
		"a route is gone": {func(_ *verify.Cluster, s *answer.Node) {
			s.Kernel.Routes = slices.DeleteFunc(slices.Clone(s.Kernel.Routes), func(r podnet.Route) bool { return r.To.String() == "10.244.1.0/24" })
		}, []string{"route 10.244.1.0/24 via 10.0.0.2 dev eth0 is missing"}},
		"a node is gone, its route is not": {func(c *verify.Cluster, _ *answer.Node) { c.Nodes = c.Nodes[:1] },
			[]string{"guard: node 10.0.0.2 should not be there", "masquerade: node 10.0.0.2 should not be there", "masquerade: pod range 10.244.1.0/24 should not be there",
				"route 10.244.1.0/24 via 10.0.0.2 dev eth0 should not be there"}},
		"no guard": {func(_ *verify.Cluster, s *answer.Node) { s.Kernel.Guard = podnet.Guard{} },
			[]string{"guard: pods may pass for others: the table of rules is missing, or is another one"}},
		"a guard that is open": {func(_ *verify.Cluster, s *answer.Node) { s.Kernel.Guard.Open = podnet.Metadata[:1] },
			[]string{"guard: open range 169.254.169.254/32 should not be there"}},
		"the agent plans wrongly": {func(_ *verify.Cluster, s *answer.Node) { s.Plan = podnet.Plan{Node: "a"}; s.Kernel.Routes = nil },
			[]string{"route 10.244.1.0/24 via 10.0.0.2 dev eth0 is missing", "route unreachable 10.244.0.0/24 metric 65535 is missing"}},
		"another address": {func(_ *verify.Cluster, s *answer.Node) { s.Leases[0].Addresses = addrs("10.244.0.3") },
			[]string{"neighbour 10.244.0.3 dev web-abcde of pod default/web is missing", "pod default/web has 10.244.0.2 in the API, but its lease is for 10.244.0.3",
				"route 10.244.0.2 dev web-abcde should not be there: pod default/web does not have that address", "route 10.244.0.3 dev web-abcde to pod default/web is missing"}},
		"no lease": {func(_ *verify.Cluster, s *answer.Node) { s.Leases = nil },
			[]string{"device web-abcde () has no lease", "pod default/web has 10.244.0.2 without a lease"}},
		"a lease without a pod": {func(c *verify.Cluster, _ *answer.Node) { c.Pods = nil },
			[]string{"10.244.0.2 is held for pod default/web, which does not exist"}},
		"a pod of the same name came after it": {func(c *verify.Cluster, _ *answer.Node) { c.Pods[0].UID = "u2" },
			[]string{"10.244.0.2 is held for pod default/web, which does not exist", "pod default/web has 10.244.0.2 without a lease"}},
		"a runtime without UIDs": {func(_ *verify.Cluster, s *answer.Node) { s.Leases[0].UID = "" }, nil},
		"no device":              {func(_ *verify.Cluster, s *answer.Node) { s.Pods = nil }, []string{"pod default/web has no device: web-abcde is missing"}},
		"no neighbour, and another MTU": {func(_ *verify.Cluster, s *answer.Node) { s.Pods[0].Neighbours, s.Pods[0].MTU = nil, 9000 },
			[]string{"device web-abcde of pod default/web has MTU 9000, but the network's is 1500", "neighbour 10.244.0.2 dev web-abcde of pod default/web is missing"}},
		"out of range": {func(c *verify.Cluster, s *answer.Node) {
			c.Pods[0].Status.PodIPs[0].IP, s.Leases[0].Addresses = "10.99.0.2", addrs("10.99.0.2")
			s.Pods[0].Routes, s.Pods[0].Neighbours = addrs("10.99.0.2"), addrs("10.99.0.2")
		}, []string{"pod default/web has 10.99.0.2, which is in none of the node's ranges [10.244.0.0/24]"}},
		"of another pool": {func(c *verify.Cluster, s *answer.Node) {
			c.Pods[0].Status.PodIPs[0].IP, s.Leases[0].Addresses, s.Leases[0].Pool = "10.99.0.2", addrs("10.99.0.2"), "special"
			s.Pods[0].Routes, s.Pods[0].Neighbours = addrs("10.99.0.2"), addrs("10.99.0.2")
		}, []string{"pod default/web has 10.99.0.2 of pool special, which is in no block of the node"}},
		"a stray route": {func(_ *verify.Cluster, s *answer.Node) { s.Strays = addrs("10.244.0.9") }, []string{"route 10.244.0.9 leads to no pod's device"}},
		"two leases, one address": {func(c *verify.Cluster, s *answer.Node) {
			c.Pods = append(c.Pods, pod("two", "u2", "10.244.0.2"))
			s.Leases = append(s.Leases, answer.Lease{Namespace: "default", Pod: "two", UID: "u2", Device: "web-abcde", Addresses: addrs("10.244.0.2")})
		}, []string{"address 10.244.0.2 is held for default/web and for default/two"}},
		"not ready": {func(_ *verify.Cluster, s *answer.Node) { s.Ready, s.Reason = false, "why" }, []string{"the agent is not ready: why"}},
		"a pod that has ended holds nothing": {func(c *verify.Cluster, s *answer.Node) {
			c.Pods[0].Status.Phase, s.Leases, s.Pods = corev1.PodSucceeded, nil, nil
		}, nil},
		"hostNetwork": {func(c *verify.Cluster, s *answer.Node) {
			p := pod("host", "u3", "10.0.0.1")
			p.Spec.HostNetwork = true
			c.Pods = append(c.Pods, p)
		}, nil},
		"a configuration that is wrong": {func(c *verify.Cluster, _ *answer.Node) { c.Config = map[string]string{"mode": "x"} },
			[]string{`the configuration is invalid, and the previous one is kept: mode: "x": want auto or direct or vxlan`}},
	} {
		c := cluster()
		s := state(t, c)
		tt.change(&c, &s)
		var got []string
		for _, d := range verify.Pods(c, "a", s) {
			got = append(got, d.Text)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s:\ngot\n\t%s\nwant\n\t%s", name, strings.Join(got, "\n\t"), strings.Join(tt.want, "\n\t"))
		}
	}
}

func TestDoubles(t *testing.T) {
	other := pod("other", "u9", "10.244.0.2")
	other.Spec.NodeName = "b"
	got := verify.Doubles([]*corev1.Pod{pod("web", "u1", "10.244.0.2"), other})
	if len(got) != 1 || got[0].String() != "node b: pod default/other has 10.244.0.2, and so does default/web on node a" {
		t.Errorf("%v", got)
	}
}
