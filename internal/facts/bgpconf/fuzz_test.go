package bgpconf

import (
	"encoding/json"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// FuzzRead reads what an API server without our schema could hand over: every session is one that can be held, and what
// is no session is a problem.
func FuzzRead(f *testing.F) {
	for _, p := range []*v1alpha1.BGPPeer{plain("a", "10.0.0.254"), plain("b", "fd00::fe", func(s *v1alpha1.BGPPeerSpec) {
		s.Communities, s.Advertise = []string{"64512:1", "no-export"}, []v1alpha1.BGPAdvertised{v1alpha1.AdvertiseServiceAddresses, "other"}
		s.HoldTimeSeconds, s.KeepaliveTimeSeconds, s.PeerASN = -1, 5, 1<<40
	}), plain("c", "10.0.0.252", func(s *v1alpha1.BGPPeerSpec) {
		s.Advertisements = []v1alpha1.BGPAdvertisement{{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPPodCIDR}, AggregationLength: 24, AggregationLengthV6: -1,
			PoolSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"site": "edge"}}, ServiceSelector: &metav1.LabelSelector{}, Communities: []string{"1:1"}, LocalPref: new(int64)}}
	}), onDevice("d", "eth1"), onDevice("e", "eth5")} {
		data, err := json.Marshal(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	node := shop()
	node.Heard = heardNode().Heard
	f.Fuzz(func(t *testing.T, data []byte) {
		var p v1alpha1.BGPPeer
		if json.Unmarshal(data, &p) != nil {
			return
		}
		s, problems := Read([]*v1alpha1.BGPPeer{&p, plain("other", "10.0.0.253")}, node, noSecrets)
		for _, peer := range s.Peers {
			if !peer.Address.IsValid() || peer.ASN == 0 || peer.LocalASN == 0 || peer.HoldTime < 0 || peer.Keepalive < 0 || peer.RestartTime < 0 || peer.Hops == 0 {
				t.Errorf("%s", render(peer))
			}
			for _, r := range peer.Routes {
				if !r.Prefix.IsValid() {
					t.Errorf("route %+v", r)
				}
			}
		}
		for _, problem := range problems {
			if problem.Text == "" {
				t.Error("a problem without words")
			}
		}
	})
}
