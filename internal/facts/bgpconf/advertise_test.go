package bgpconf

import (
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// shop is a node that is sent packets for Services of two pools.
func shop() Node {
	n := dualNode()
	const balancer, external, cluster = v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPExternalIP, v1alpha1.BGPClusterIP
	n.ServiceAddresses = []ServiceAddress{
		of("", cluster, "10.96.0.9", "web"), of("", cluster, "10.96.0.10", "mail"),
		of("edge", balancer, "192.0.2.80", "web"), of("edge", balancer, "192.0.2.81", "mail"), of("edge", external, "192.0.2.90", "web"),
		of("inside", balancer, "198.51.100.5", "web"), of("inside", balancer, "198.51.100.5", "mail"), of("inside", balancer, "2001:db8::5", "web"),
	}
	return n
}

func matching(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

func TestAdvertisements(t *testing.T) {
	pref, much := int64(200), int64(1<<32)
	type adverts = []v1alpha1.BGPAdvertisement
	kinds := func(k ...v1alpha1.BGPAddresses) []v1alpha1.BGPAddresses { return k }
	const pods, balancer, external, cluster = v1alpha1.BGPPodCIDR, v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPExternalIP, v1alpha1.BGPClusterIP
	const allBalanced = "192.0.2.80/32 192.0.2.81/32 198.51.100.5/32 2001:db8::5/128 via fd00::1"
	for _, tc := range []struct {
		name     string
		change   func(*v1alpha1.BGPPeerSpec)
		adverts  adverts
		want     string
		problems []string
	}{
		{name: "as before there were any", change: func(s *v1alpha1.BGPPeerSpec) {
			s.Advertise = []v1alpha1.BGPAdvertised{v1alpha1.AdvertisePodCIDRs, v1alpha1.AdvertiseServiceAddresses}
		}, want: "10.244.1.0/24 192.0.2.80/32 192.0.2.81/32 198.51.100.5/32 2001:db8::5/128 via fd00::1 fd00:244:1::/64 via fd00::1"},
		{name: "in the place of advertise", change: func(s *v1alpha1.BGPPeerSpec) { s.Advertise = []v1alpha1.BGPAdvertised{v1alpha1.AdvertisePodCIDRs} },
			adverts: adverts{{Addresses: kinds(balancer)}}, want: allBalanced},
		{name: "pods", adverts: adverts{{Addresses: kinds(pods), Communities: []string{"1:1"}, AggregationLength: 8}}, want: "10.244.1.0/24 mark 1:1 fd00:244:1::/64 via fd00::1 mark 1:1"},
		{name: "external IPs", adverts: adverts{{Addresses: kinds(external)}}, want: "192.0.2.90/32"},
		{name: "ClusterIPs, which are of no pool", adverts: adverts{{Addresses: kinds(cluster, balancer), Pools: []string{"none"}}}, want: "10.96.0.9/32 10.96.0.10/32"},
		{name: "a pool", adverts: adverts{{Addresses: kinds(balancer, external), Pools: []string{"edge"}}}, want: "192.0.2.80/32 192.0.2.81/32 192.0.2.90/32"},
		{name: "pools with a label", adverts: adverts{{Addresses: kinds(balancer, external), PoolSelector: matching("site", "inside")}}, want: "198.51.100.5/32 2001:db8::5/128 via fd00::1"},
		{name: "by name or label", adverts: adverts{{Addresses: kinds(balancer), Pools: []string{"edge"}, PoolSelector: matching("site", "inside")}}, want: allBalanced},
		{name: "Services with a label", adverts: adverts{{Addresses: kinds(balancer, external, cluster), ServiceSelector: matching("app", "mail")}}, want: "10.96.0.10/32 192.0.2.81/32 198.51.100.5/32"},
		{name: "no Service", adverts: adverts{{Addresses: kinds(balancer), ServiceSelector: matching("app", "none")}}, want: ""},
		{name: "aggregated", adverts: adverts{{Addresses: kinds(balancer), AggregationLength: 24, AggregationLengthV6: 64}}, want: "192.0.2.0/24 198.51.100.0/24 2001:db8::/64 via fd00::1"},
		{name: "aggregate and addresses", adverts: adverts{{Addresses: kinds(balancer), Pools: []string{"edge"}, AggregationLength: 24}, {Addresses: kinds(balancer), Pools: []string{"edge"}, Communities: []string{"no-export"}}},
			want: "192.0.2.0/24 192.0.2.80/32 mark 65535:65281 192.0.2.81/32 mark 65535:65281"},
		{name: "an aggregate that holds the nodes", adverts: adverts{{Addresses: kinds(cluster), AggregationLength: 8}}, want: "",
			problems: []string{"BGPPeer a: 10.0.0.0/8 is not announced: the router or this node is in it, who would not be reached any more; choose a greater aggregationLength"}},
		{name: "communities of all that have it", change: func(s *v1alpha1.BGPPeerSpec) { s.Communities = []string{"1:1", "9:9"} },
			adverts: adverts{{Addresses: kinds(balancer), Pools: []string{"edge"}, Communities: []string{"1:2:3", "1:1"}}, {Addresses: kinds(balancer), ServiceSelector: matching("app", "web"), Communities: []string{"5:5"}}},
			want:    "192.0.2.80/32 mark 1:1 mark 5:5 mark 9:9 mark 1:2:3 192.0.2.81/32 mark 1:1 mark 9:9 mark 1:2:3 198.51.100.5/32 mark 1:1 mark 5:5 mark 9:9 2001:db8::5/128 via fd00::1 mark 1:1 mark 5:5 mark 9:9"},
		{name: "the first preference that there is", change: func(s *v1alpha1.BGPPeerSpec) { s.PeerASN = s.LocalASN },
			adverts: adverts{{Addresses: kinds(external)}, {Addresses: kinds(external), LocalPref: &pref}, {Addresses: kinds(external), LocalPref: new(int64)}}, want: "192.0.2.90/32 pref 200"},
		{name: "a preference for another AS", adverts: adverts{{Addresses: kinds(external), LocalPref: &pref}}, want: "-",
			problems: []string{"BGPPeer a: advertisements: localPref is for a peer of the same AS; mark routes for others by communities"}},
		{name: "mistakes", change: func(s *v1alpha1.BGPPeerSpec) { s.PeerASN, s.Communities = s.LocalASN, []string{"x"} },
			adverts: adverts{{Addresses: kinds("Everything"), AggregationLength: 33, LocalPref: &much, Communities: []string{"y"},
				ServiceSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Like"}}}}}, want: "-",
			problems: []string{
				`BGPPeer a: community "x": want something like 64512:100, 64512:1:100 or no-export`,
				`BGPPeer a: community "y": want something like 64512:100, 64512:1:100 or no-export`,
				`BGPPeer a: advertise: there is no "Everything"`,
				"BGPPeer a: advertisements: aggregationLength 33 and aggregationLengthV6 128: want 1 to 32 and 1 to 128",
				`BGPPeer a: advertisements: serviceSelector: "Like" is not a valid label selector operator`,
				"BGPPeer a: advertisements: localPref 4294967296: want 0 to 4294967295",
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.Advertisements = tc.adverts })
			if tc.change != nil {
				tc.change(&p.Spec)
			}
			s, found := Read([]*v1alpha1.BGPPeer{p}, shop(), noSecrets)
			got := "-" // refused
			if len(s.Peers) == 1 {
				_, got, _ = strings.Cut(render(s.Peers[0]), " password none")
				got = strings.TrimSpace(got)
			}
			var problems []string
			for _, x := range found {
				problems = append(problems, x.String())
			}
			if got != tc.want || !slices.Equal(problems, tc.problems) {
				t.Errorf("got\n%s\n%s\nwant\n%s\n%s", got, strings.Join(problems, "\n"), tc.want, strings.Join(tc.problems, "\n"))
			}
		})
	}
}

// TestAddressesOfRoutes: who looks is told for which addresses a prefix is announced, which is nothing to the router.
func TestAddressesOfRoutes(t *testing.T) {
	p := plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
		s.Advertisements = []v1alpha1.BGPAdvertisement{{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPLoadBalancerIP}, AggregationLength: 24}}
	})
	s, _ := Read([]*v1alpha1.BGPPeer{p}, shop(), noSecrets)
	first := s.Peers[0].Routes[0]
	if want := addrs("192.0.2.80", "192.0.2.81"); !slices.Equal(first.Addrs, want) {
		t.Errorf("%s is for %v, want %v", first.Prefix, first.Addrs, want)
	}
	less := first
	less.Addrs = less.Addrs[:1]
	if !first.Like(less) {
		t.Error("a Service more is another route")
	}
	for _, p := range []*v1alpha1.BGPPeer{p, plain("b", "10.0.0.254")} {
		if got, want := ForServices(p, v1alpha1.BGPLoadBalancerIP), p.Name == "a"; got != want || ForServices(p, v1alpha1.BGPClusterIP) {
			t.Errorf("BGPPeer %s is for load balancers' addresses: %v, want %v; for ClusterIPs: %v, want false", p.Name, got, want, ForServices(p, v1alpha1.BGPClusterIP))
		}
	}
}

// TestAggregates: of what is announced for Services' addresses those prefixes are aggregates that hold others, too.
func TestAggregates(t *testing.T) {
	one := plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
		s.Advertisements = []v1alpha1.BGPAdvertisement{{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPPodCIDR}, AggregationLength: 24, AggregationLengthV6: 64}}
	})
	two := plain("b", "10.0.0.253", func(s *v1alpha1.BGPPeerSpec) {
		s.Advertisements = append(slices.Clone(one.Spec.Advertisements), v1alpha1.BGPAdvertisement{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPLoadBalancerIP}})
	})
	s, _ := Read([]*v1alpha1.BGPPeer{one, two}, shop(), noSecrets)
	if got, want := s.Aggregates(), prefixes("192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64"); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if s, _ = Read([]*v1alpha1.BGPPeer{plain("c", "10.0.0.252")}, shop(), noSecrets); s.Aggregates() != nil {
		t.Errorf("%v, want none", s.Aggregates())
	}
}
