package verify_test

import (
	"encoding/json"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/insight/verify"
	"github.com/fathom-network/fathom/internal/testenv"
)

// What a node says of itself is compared whatever it is: the node may be somebody else's.
func FuzzState(f *testing.F) {
	c := cluster()
	whole, err := json.Marshal(state(f, c))
	testenv.Must(f, err)
	f.Add(whole)
	f.Add([]byte(`{"Leases":[{"Addresses":[""]}],"Pods":[{"Routes":["fe80::1%x"]}],"Kernel":{"Tunnel":{}},"Plan":{"Peers":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.Node
		if json.Unmarshal(data, &s) == nil {
			verify.Pods(c, "a", s)
		}
	})
}

func FuzzBGP(f *testing.F) {
	c := cluster()
	c.BGPPeers = []*v1alpha1.BGPPeer{{ObjectMeta: metav1.ObjectMeta{Name: "r"}, Spec: v1alpha1.BGPPeerSpec{Interface: "eth1", PeerASN: 1, LocalASN: 2,
		Advertisements: []v1alpha1.BGPAdvertisement{{Addresses: []v1alpha1.BGPAddresses{v1alpha1.BGPPodCIDR, v1alpha1.BGPLoadBalancerIP}, AggregationLength: 24}}}}}
	f.Add([]byte(`{"decided":true,"heard":{"eth1":{"Router":"fe80::1"}},"serviceAddresses":[{"Addr":"192.0.2.1","Kind":"LoadBalancerIP"}],"sessions":[{"peer":"r","address":"[fe80::1%eth1]:179","told":[{"Prefix":"","NextHop":""}]}],"aggregates":[""]}`))
	f.Add([]byte(`{"decided":true,"links":[{"Device":"eth0","Addrs":["10.0.0.1/24"]}],"serviceAddresses":[{"Addr":""}],"aggregates":["::/0"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.BGP
		if json.Unmarshal(data, &s) == nil {
			verify.BGP(c, "a", s)
		}
	})
}

func FuzzServices(f *testing.F) {
	c := cluster()
	whole, err := json.Marshal(answer.Services{})
	testenv.Must(f, err)
	f.Add(whole)
	f.Add([]byte(`{"Config":{"Mode":"auto"},"NFTables":{"Frontends":[{"Key":{"Addr":""}}]},"Connect":[{}],"Loopback":true}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s answer.Services
		if json.Unmarshal(data, &s) == nil {
			verify.Services(c, "a", s)
		}
	})
}
