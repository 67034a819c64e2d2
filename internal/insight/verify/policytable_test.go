package verify

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
)

func policyCluster() policyfacts.Cluster {
	pod := func(name, node, ip string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: name, Labels: map[string]string{"app": name}},
			Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}}
	}
	return policyfacts.Cluster{
		Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "x"}}},
		Pods:       []*corev1.Pod{pod("a", "one", "10.0.1.2"), pod("b", "one", "10.0.1.3"), pod("c", "two", "10.0.2.2")},
		Policies: []*networkingv1.NetworkPolicy{{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: "web"}, Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "a"}}, PolicyTypes: []networkingv1.PolicyType{"Ingress"},
			Ingress: []networkingv1.NetworkPolicyIngressRule{
				{From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "c"}}}}},
				{From: []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "192.0.2.0/24"}}}},
			}}}},
	}
}

// heldPolicies is what the agent of a node answers where all is as it should be, with numbers of its own, as it comes over the wire.
func heldPolicies(t testing.TB, c policyfacts.Cluster, node string) (s answer.Policies) {
	t.Helper()
	m := policy.NewModel(node)
	for _, n := range c.Namespaces {
		m.SetNamespace(n.Name, n.Labels)
	}
	for _, o := range c.Pods {
		if p, ok := policyfacts.Pod(o); ok {
			m.SetPod(p)
		}
	}
	for _, p := range c.Policies {
		m.SetPolicy(policyfacts.NetworkPolicy(p))
	}
	f := m.Facts()
	g := policy.Facts{Addrs: map[netip.Addr]policy.Address{}, Classes: map[policy.Number]*policy.Class{}}
	for a, is := range f.Addrs {
		is.Peer ^= 0x100
		g.Addrs[a] = is
	}
	for n, c := range f.Classes {
		d := *c
		d.Allows = slices.Clone(c.Allows)
		for i := range d.Allows {
			if d.Allows[i].Peer != 0 {
				d.Allows[i].Peer ^= 0x100
			}
		}
		g.Classes[n] = &d
	}
	ranges := []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24")}
	b, err := json.Marshal(answer.Policies{Known: true, On: true, Found: true, Ranges: ranges, KernelRanges: ranges, Kernel: g})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestVerifyPolicies(t *testing.T) {
	addr := netip.MustParseAddr
	class := func(s *answer.Policies) *policy.Class {
		return s.Kernel.Classes[s.Kernel.Addrs[addr("10.0.1.2")].Isolated[policy.Ingress]]
	}
	for name, tc := range map[string]struct {
		node    string
		objects func(*policyfacts.Cluster)
		kernel  func(*answer.Policies)
		want    []string // parts of what is said, in order
	}{
		"all is well": {node: "one"},
		"a node without isolated pods": {node: "two", kernel: func(s *answer.Policies) {
			s.KernelRanges = s.Ranges
		}},
		"no policies, nor a table": {node: "one", objects: func(c *policyfacts.Cluster) { c.Policies = nil }, kernel: func(s *answer.Policies) { *s = answer.Policies{Known: true} }},
		"no table":                 {node: "one", kernel: func(s *answer.Policies) { *s = answer.Policies{Known: true} }, want: []string{"policies may not be enforced"}},
		"a table without policies": {node: "one", objects: func(c *policyfacts.Cluster) { c.Policies = nil }, want: []string{"there are no policies, but"}},
		"an agent in trouble":      {node: "one", kernel: func(s *answer.Policies) { s.Problem = "no" }, want: []string{"the agent says: no"}},
		"other ranges":             {node: "one", kernel: func(s *answer.Policies) { s.KernelRanges = nil }, want: []string{"in the ranges , want 10.0.1.0/24"}},
		"a pod is open": {node: "one", kernel: func(s *answer.Policies) {
			a := s.Kernel.Addrs[addr("10.0.1.2")]
			a.Isolated = [2]policy.Number{}
			s.Kernel.Addrs[addr("10.0.1.2")] = a
		}, want: []string{"ingress of Pod x/a (10.0.1.2) is open to what its policies forbid: no NetworkPolicies are asked, want NetworkPolicy x/web"}},
		"a pod is audited and should be isolated": {node: "one", kernel: func(s *answer.Policies) {
			a := s.Kernel.Addrs[addr("10.0.1.2")]
			a.Audited[policy.Ingress] = true
			s.Kernel.Addrs[addr("10.0.1.2")] = a
		}, want: []string{"ingress of Pod x/a (10.0.1.2) is open to what its policies forbid: they are audited, want NetworkPolicy x/web enforced"}},
		"a pod is isolated and should be audited": {node: "one", objects: func(c *policyfacts.Cluster) {
			c.Policies[0].Labels = map[string]string{policy.Audit: "true"}
		}, want: []string{"ingress of Pod x/a (10.0.1.2) is closed to what its policies only audit: NetworkPolicy x/web"}},
		"a pod is isolated that none selects": {node: "one", kernel: func(s *answer.Policies) {
			a := s.Kernel.Addrs[addr("10.0.1.3")]
			a.Isolated = s.Kernel.Addrs[addr("10.0.1.2")].Isolated
			s.Kernel.Addrs[addr("10.0.1.3")] = a
		}, want: []string{"ingress of Pod x/b (10.0.1.3) is asked about NetworkPolicies, but none selects it"}},
		"a pod is closed": {node: "one", kernel: func(s *answer.Policies) {
			a := s.Kernel.Addrs[addr("10.0.1.3")]
			a.Own = false
			s.Kernel.Addrs[addr("10.0.1.3")] = a
		}, want: []string{"Pod x/b (10.0.1.3) is closed"}},
		"an address is another pod's": {node: "one", kernel: func(s *answer.Policies) {
			a := s.Kernel.Addrs[addr("10.0.1.3")]
			a.Peer = s.Kernel.Addrs[addr("10.0.2.2")].Peer
			s.Kernel.Addrs[addr("10.0.1.3")] = a
		}, want: []string{`10.0.2.2 of Pod x/c counts as "x app=b", want "x app=c"`, "the kernel lacks: all allowed", "no policy says: all allowed"}},
		"an address that nobody has": {node: "one", kernel: func(s *answer.Policies) {
			s.Kernel.Addrs[addr("10.0.1.9")] = policy.Address{Peer: 7, Of: "x app=z", Own: true, Pod: service.Name{Namespace: "x", Name: "z"}}
		}, want: []string{`10.0.1.9 counts as "x app=z", but is no pod's address`, "10.0.1.9 may send and hear"}},
		"a peer is missing, and a range too many": {node: "one", kernel: func(s *answer.Policies) {
			class(s).Allows = nil
			class(s).Blocks = append(class(s).Blocks, policy.AllowBlock{First: addr("198.51.100.0"), Last: addr("198.51.100.9"), Grant: policy.Grant{Protocol: service.TCP, From: 80, To: 80}})
		}, want: []string{`ingress of Pod x/a (10.0.1.2): no policy says: 80/TCP allowed with 198.51.100.0 to 198.51.100.9`, `the kernel lacks: all allowed with pods "x app=c", by x/web spec.ingress[0].from[0]`}},
	} {
		c := policyCluster()
		s := heldPolicies(t, c, tc.node)
		if tc.objects != nil {
			tc.objects(&c)
		}
		if tc.kernel != nil {
			tc.kernel(&s)
		}
		var got []string
		for _, d := range Policies(c, tc.node, s) {
			got = append(got, d.Text)
		}
		slices.Sort(got)
		want := slices.Clone(tc.want)
		ok := len(got) == len(want)
		for _, w := range want {
			ok = ok && slices.ContainsFunc(got, func(g string) bool { return strings.Contains(g, w) })
		}
		if !ok {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

// FuzzPolicies: what a node says of itself is compared whatever it is.
func FuzzPolicies(f *testing.F) {
	c := policyCluster()
	b, err := json.Marshal(heldPolicies(f, c, "one"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"Found":true,"Ranges":[""],"KernelRanges":["::/0"],"Kernel":{"Addrs":{"":{"Own":true},"10.0.1.2":{"Own":true,"Isolated":[7,8],"Tiers":[9,9]}},"Classes":{"7":null,"9":{"Tiers":true,"Allows":[{"Peer":1}],"Blocks":[{}]}}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.Policies
		if json.Unmarshal(data, &s) == nil {
			Policies(c, "one", s)
		}
	})
}
