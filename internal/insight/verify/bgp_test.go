package verify

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestBGP: of an agent that does what it should nothing is told, and each thing that it does otherwise is.
func TestBGP(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "a", Labels: map[string]string{"rack": "1"}}, Spec: corev1.NodeSpec{PodCIDR: "10.244.1.0/24", PodCIDRs: []string{"10.244.1.0/24"}},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.10"}}}}
	peer := func(name, address string, change func(*v1alpha1.BGPPeerSpec)) *v1alpha1.BGPPeer {
		p := &v1alpha1.BGPPeer{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.BGPPeerSpec{PeerAddress: address, PeerASN: 64500, LocalASN: 64512}}
		if change != nil {
			change(&p.Spec)
		}
		return p
	}
	c := Cluster{Nodes: []*corev1.Node{node}, BGPPeers: []*v1alpha1.BGPPeer{
		peer("border", "192.0.2.1", func(s *v1alpha1.BGPPeerSpec) {
			s.PasswordSecret = &v1alpha1.SecretKey{Key: "border"}
			s.Advertisements = []v1alpha1.BGPAdvertisement{{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPPodCIDR}, Communities: []string{"1:1"}},
				{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPLoadBalancerIP}, AggregationLength: 24}}
		}),
		peer("leaf", "", func(s *v1alpha1.BGPPeerSpec) { s.Interface = "eth1" }),
		peer("other", "192.0.2.2", func(s *v1alpha1.BGPPeerSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"rack": "2"}}
		}),
	}}
	one, err := bgpconf.ParseCommunity("1:1")
	testenv.Must(t, err)
	pods, aggregate := netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("203.0.113.0/24")
	for _, tc := range []struct {
		name   string
		change func(*answer.BGP)
		want   []string
	}{
		{"nothing", func(*answer.BGP) {}, nil},
		{"not up", func(a *answer.BGP) {
			a.Sessions[0].State, a.Sessions[0].Reason = "Active", "connection refused"
		}, []string{"BGPPeer border: the session with 192.0.2.1:179 is Active: connection refused"}},
		{"not there", func(a *answer.BGP) { a.Sessions = a.Sessions[1:] }, []string{"BGPPeer border: the node has no session with 192.0.2.1:179"}},
		{"refused", func(a *answer.BGP) {
			a.Sessions, a.Refused = a.Sessions[1:], map[string]string{"border": "passwordSecret: there is none"}
		}, []string{"BGPPeer border: there is no session: passwordSecret: there is none"}},
		{"of a peer that is gone", func(a *answer.BGP) {
			a.Sessions = append(a.Sessions, answer.BGPSession{Peer: "gone", Address: netip.MustParseAddrPort("192.0.2.9:179"), State: established},
				answer.BGPSession{Peer: "other", Address: netip.MustParseAddrPort("192.0.2.2:179"), State: established})
		}, []string{"BGPPeer gone: there is a session with 192.0.2.9:179, but there should be none: the object is gone, or does not select this node",
			"BGPPeer other: there is a session with 192.0.2.2:179, but there should be none: the object is gone, or does not select this node"}},
		{"with another router", func(a *answer.BGP) { a.Sessions[0].Address = netip.MustParseAddrPort("192.0.2.3:179") },
			[]string{"BGPPeer border: the session is with 192.0.2.3:179 instead of 192.0.2.1:179"}},
		{"a router that was not heard", func(a *answer.BGP) {
			a.Heard, a.Sessions = nil, a.Sessions[:1]
		}, []string{"BGPPeer leaf: no router advertisement was heard on eth1: does the router send them there, and is that the link to it? Else name its peerAddress"}},
		{"routes", func(a *answer.BGP) {
			a.Sessions[0].Told[0].Communities = nil
			a.Sessions[1].Told = []bgpconf.Route{{Prefix: netip.MustParsePrefix("10.244.9.0/24")}}
		}, []string{"BGPPeer border: 10.244.1.0/24 is announced with another next hop, other communities or another preference than the BGPPeer says",
			"BGPPeer leaf: 10.244.1.0/24 is not announced", "BGPPeer leaf: 10.244.9.0/24 is announced, but the BGPPeer does not advertise it"}},
		{"aggregates", func(a *answer.BGP) { a.Aggregates = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")} },
			[]string{"nftables: table inet fathom-aggregates: packets for unused addresses in 198.51.100.0/24 are refused, but it is not announced",
				"nftables: table inet fathom-aggregates: packets for unused addresses in 203.0.113.0/24, which is announced, go back to the router"}},
		{"an agent that has just begun", func(a *answer.BGP) { *a = answer.BGP{Heard: a.Heard} }, []string{"BGP: the agent has not decided yet what it announces"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := answer.BGP{Decided: true, Heard: map[string]bgpconf.Heard{"eth1": {Router: netip.MustParseAddr("fe80::1")}}, Aggregates: []netip.Prefix{aggregate},
				ServiceAddresses: []bgpconf.ServiceAddress{{Addr: netip.MustParseAddr("203.0.113.7"), Kind: v1alpha1.BGPLoadBalancerIP, Pool: "p"}},
				Sessions: []answer.BGPSession{
					{Peer: "border", Address: netip.MustParseAddrPort("192.0.2.1:179"), State: established,
						Told: []bgpconf.Route{{Prefix: pods, Communities: []bgpconf.Community{one}}, {Prefix: aggregate, Addrs: []netip.Addr{netip.MustParseAddr("203.0.113.7")}}}},
					{Peer: "leaf", Address: netip.MustParseAddrPort("[fe80::1%eth1]:179"), State: established, Told: []bgpconf.Route{{Prefix: pods}}},
				}}
			tc.change(&a)
			data, err := json.Marshal(a) // as agents tell it
			testenv.Must(t, err)
			var heard answer.BGP
			testenv.Must(t, json.Unmarshal(data, &heard))
			var got []string
			for _, d := range BGP(c, "a", heard) {
				got = append(got, d.Text)
			}
			slices.Sort(got)
			if !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}
