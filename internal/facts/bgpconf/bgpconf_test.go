package bgpconf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/service"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// plain is a BGPPeer with nothing but what it must have, as old as its name sorts.
func plain(name, address string, change ...func(*v1alpha1.BGPPeerSpec)) *v1alpha1.BGPPeer {
	p := &v1alpha1.BGPPeer{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(epoch)},
		Spec: v1alpha1.BGPPeerSpec{PeerAddress: address, PeerASN: 64500, LocalASN: 64512}}
	for _, f := range change {
		f(&p.Spec)
	}
	return p
}

func addrs(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

func dualNode() Node {
	return Node{Name: "n1", Labels: map[string]string{"rack": "a"}, Addrs: addrs("10.0.0.1", "fd00::1"),
		PodCIDRs: prefixes("10.244.1.0/24", "fd00:244:1::/64"), ServiceAddresses: []ServiceAddress{of("office", v1alpha1.BGPLoadBalancerIP, "192.0.2.80", "web")}}
}

// heardNode is dualNode with links on which something was heard, or nothing.
func heardNode() Node {
	n := dualNode()
	n.Heard = map[string]Heard{"eth1": {Router: netip.MustParseAddr("fe80::1")}, "eth2": {Router: netip.MustParseAddr("fe80::2"), Other: netip.MustParseAddr("fe80::22")},
		"eth3": {Router: netip.MustParseAddr("fe80::3"), Problem: "it has no link-local address"}, "eth4": {Problem: "this node has no such device"}, "eth5": {}}
	return n
}

func onDevice(name, device string) *v1alpha1.BGPPeer {
	return plain(name, "", func(s *v1alpha1.BGPPeerSpec) { s.Interface = device })
}

// of is an address of a Service, whose label app is its name, and of a pool with the label site: of the same name.
func of(pool string, kind v1alpha1.BGPAddresses, addr, name string) ServiceAddress {
	a := ServiceAddress{Addr: netip.MustParseAddr(addr), Kind: kind, Service: service.Name{Name: name}, Labels: labels.Set{"app": name}}
	if pool != "" {
		a.Pool, a.PoolLabels = pool, labels.Set{"site": pool}
	}
	return a
}

func noSecrets(string) (map[string][]byte, error) { return nil, errors.New("there are none") }

// render is a peer in one line.
func render(p Peer) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s ", p.Name, p.Address)
	if p.Unnumbered {
		b.WriteString("unnumbered ")
	}
	fmt.Fprintf(&b, "AS%d from AS%d hold %v keep %v hops %d restart %v password %v", p.ASN, p.LocalASN, p.HoldTime, p.Keepalive, p.Hops, p.RestartTime, p.Password)
	if p.TTLSecurity {
		b.WriteString(" ttl security")
	}
	for _, r := range p.Routes {
		fmt.Fprintf(&b, " %s", r.Prefix)
		if r.NextHop.IsValid() {
			fmt.Fprintf(&b, " via %s", r.NextHop)
		}
		for _, c := range r.Communities {
			fmt.Fprintf(&b, " mark %s", c)
		}
		if r.LocalPref != nil {
			fmt.Fprintf(&b, " pref %d", *r.LocalPref)
		}
	}
	return b.String()
}

func TestRead(t *testing.T) {
	four := Node{Name: "n4", Addrs: addrs("10.0.0.4"), PodCIDRs: prefixes("10.244.4.0/24", "fd00:244:4::/64")}
	six := Node{Name: "n6", Addrs: addrs("fd00::6"), PodCIDRs: prefixes("fd00:244:6::/64")}
	secrets := func(name string) (map[string][]byte, error) {
		if name == "locked" {
			return nil, apierrors.NewForbidden(corev1.Resource("secrets"), name, errors.New("no role"))
		}
		if name != "bgp" {
			return nil, fmt.Errorf("secrets %q not found", name)
		}
		return map[string][]byte{"password": []byte("x"), "long": make([]byte, 81)}, nil
	}
	const defaults = "AS64500 from AS64512 hold 1m30s keep 30s hops 1 restart 2m0s password none"
	for _, tc := range []struct {
		name     string
		node     Node
		peers    []*v1alpha1.BGPPeer
		want     []string
		problems []string
	}{
		{name: "nothing", node: dualNode()},
		{name: "IPv4 session, both families", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254")},
			want: []string{"a 10.0.0.254:179 " + defaults + " 10.244.1.0/24 fd00:244:1::/64 via fd00::1"}},
		{name: "IPv6 session, both families", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "fd00::ff")},
			want: []string{"a [fd00::ff]:179 " + defaults + " 10.244.1.0/24 via 10.0.0.1 fd00:244:1::/64"}},
		{name: "pods of a family that the node has not", node: four, peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254")},
			want:     []string{"a 10.0.0.254:179 " + defaults + " 10.244.4.0/24"},
			problems: []string{"BGPPeer a: fd00:244:4::/64 is not announced: this node has no address of its family to be the next hop"}},
		{name: "router of a family that the node has not", node: six, peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254")},
			problems: []string{"BGPPeer a: peerAddress 10.0.0.254: this node has no address of that family"}},
		{name: "link-local router", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "fe80::1", func(s *v1alpha1.BGPPeerSpec) { s.Interface = "eth1" }),
			plain("b", "fe80::1", func(s *v1alpha1.BGPPeerSpec) { s.Interface = "eth2" })},
			want: []string{"a [fe80::1%eth1]:179 " + defaults + " 10.244.1.0/24 fd00:244:1::/64", "b [fe80::1%eth2]:179 " + defaults + " 10.244.1.0/24 fd00:244:1::/64"}},
		{name: "link-local router, and the wrong interface", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "fe80::1"),
			plain("b", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.Interface = "eth1" }), plain("c", "169.254.0.1"), plain("d", "fe80::1%eth0", func(s *v1alpha1.BGPPeerSpec) { s.Interface = "eth1" })},
			problems: []string{"BGPPeer a: peerAddress fe80::1 is link-local: say by interface on which of the node's devices it is",
				"BGPPeer b: interface is for a link-local peerAddress such as fe80::1, and 10.0.0.254 is none",
				"BGPPeer c: peerAddress 169.254.0.1: want a plain unicast address",
				"BGPPeer d: interface is for a link-local peerAddress such as fe80::1, and fe80::1%eth0 is none"}},
		{name: "unnumbered", node: heardNode(), peers: []*v1alpha1.BGPPeer{onDevice("a", "eth1"), onDevice("b", "eth2"), onDevice("c", "eth3"), onDevice("d", "eth4"), onDevice("e", "eth5"), onDevice("f", "eth1"), onDevice("g", "")},
			want: []string{"a [fe80::1%eth1]:179 unnumbered " + defaults + " 10.244.1.0/24 fd00:244:1::/64", "b [fe80::2%eth2]:179 unnumbered " + defaults + " 10.244.1.0/24 fd00:244:1::/64",
				"c [fe80::3%eth3]:179 unnumbered " + defaults + " 10.244.1.0/24 fd00:244:1::/64"},
			problems: []string{"BGPPeer b: interface eth2: there are several routers, of which fe80::2 is spoken with, and fe80::22 is not: name them by peerAddress",
				"BGPPeer c: interface eth3: the router is not told of this node: it has no link-local address",
				"BGPPeer d: interface eth4: this node has no such device",
				"waits: BGPPeer e: no router advertisement was heard on eth5: does the router send them there, and is that the link to it? Else name its peerAddress",
				"BGPPeer f: [fe80::1%eth1]:179 is BGPPeer a already, which is older",
				`BGPPeer g: peerAddress "" is no address`}},
		{name: "own address", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "fd00::1")},
			problems: []string{"BGPPeer a: peerAddress fd00::1 is this node's own"}},
		{name: "all settings", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
			s.PeerPort, s.HoldTimeSeconds, s.KeepaliveTimeSeconds, s.EBGPMultihop, s.TTLSecurity = 1179, 9, 2, 3, true
			s.PasswordSecret = &v1alpha1.SecretKey{Name: "bgp"}
			s.Communities = []string{"64512:2:3", "no-export", "64512:1", "64512:1"}
			s.Advertise = []v1alpha1.BGPAdvertised{v1alpha1.AdvertiseServiceAddresses}
			s.GracefulRestart = &v1alpha1.BGPGracefulRestart{RestartTimeSeconds: 60}
		})}, want: []string{"a 10.0.0.254:1179 AS64500 from AS64512 hold 9s keep 2s hops 3 restart 1m0s password hidden ttl security" +
			" 192.0.2.80/32 mark 64512:1 mark 65535:65281 mark 64512:2:3"}},
		{name: "no graceful restart, short hold time", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
			s.GracefulRestart = &v1alpha1.BGPGracefulRestart{Enabled: new(bool)}
			s.HoldTimeSeconds, s.Advertise = 5, []v1alpha1.BGPAdvertised{}
		})}, want: []string{"a 10.0.0.254:179 AS64500 from AS64512 hold 5s keep 1s hops 1 restart 0s password none"}},
		{name: "for other nodes", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "nonsense", func(s *v1alpha1.BGPPeerSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"rack": "b"}}
		}), plain("b", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"rack": "a"}}
			s.Advertise = []v1alpha1.BGPAdvertised{}
		})}, want: []string{"b 10.0.0.254:179 " + defaults}},
		{name: "two of one address", node: dualNode(), peers: []*v1alpha1.BGPPeer{
			plain("b", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.Advertise = []v1alpha1.BGPAdvertised{} }),
			plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.PeerASN = 0 }),
			plain("c", "10.0.0.254"),
		}, want: []string{"b 10.0.0.254:179 " + defaults}, problems: []string{
			"BGPPeer a: peerASN 0: want a number from 1 to 4294967294, other than 23456 and 65535",
			"BGPPeer c: 10.0.0.254:179 is BGPPeer b already, which is older",
		}},
		{name: "everything wrong", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "fe80::1", func(s *v1alpha1.BGPPeerSpec) {
			s.PeerASN, s.LocalASN, s.PeerPort, s.HoldTimeSeconds, s.KeepaliveTimeSeconds, s.EBGPMultihop = 1<<32-1, 23456, 70000, 2, 3, 256
			s.PasswordSecret = &v1alpha1.SecretKey{Name: "none"}
			s.Communities = []string{"1:2:3:4"}
			s.Advertise = []v1alpha1.BGPAdvertised{"Everything"}
			s.GracefulRestart = &v1alpha1.BGPGracefulRestart{RestartTimeSeconds: 5000}
		})}, problems: []string{
			"BGPPeer a: peerASN 4294967295: want a number from 1 to 4294967294, other than 23456 and 65535",
			"BGPPeer a: localASN 23456: want a number from 1 to 4294967294, other than 23456 and 65535",
			"BGPPeer a: peerAddress fe80::1 is link-local: say by interface on which of the node's devices it is",
			"BGPPeer a: peerPort 70000: want 1 to 65535",
			"BGPPeer a: holdTimeSeconds 2: want 3 to 65535",
			"BGPPeer a: keepaliveTimeSeconds 3: want less than the hold time, 2s",
			"BGPPeer a: ebgpMultihop 256: want 1 to 255",
			"BGPPeer a: gracefulRestart.restartTimeSeconds 5000: want 1 to 4095",
			`BGPPeer a: passwordSecret: secrets "none" not found`,
			`BGPPeer a: community "1:2:3:4": want something like 64512:100, 64512:1:100 or no-export`,
			`BGPPeer a: advertise: there is no "Everything"`,
		}},
		{name: "passwords", node: dualNode(), peers: []*v1alpha1.BGPPeer{
			plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.PasswordSecret = &v1alpha1.SecretKey{Name: "bgp", Key: "long"} }),
			plain("b", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.PasswordSecret = &v1alpha1.SecretKey{Name: "bgp", Key: "none"} }),
			plain("c", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.PasswordSecret = &v1alpha1.SecretKey{} }),
			plain("d", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) { s.PasswordSecret = &v1alpha1.SecretKey{Name: "locked"} }),
		}, problems: []string{
			"BGPPeer a: passwordSecret: key long of Secret bgp has 81 bytes, want 1 to 80",
			"BGPPeer b: passwordSecret: Secret bgp has no key none",
			`BGPPeer c: passwordSecret: secrets "fathom-bgp" not found`,
			"BGPPeer d: passwordSecret: agents may not read Secret locked of namespace fathom-system, of which they read fathom-bgp alone. Keep the password in a key of fathom-bgp, or let them: " +
				"kubectl -n fathom-system create role bgp-locked --verb=get --resource=secrets --resource-name=locked && " +
				"kubectl -n fathom-system create rolebinding bgp-locked --role=bgp-locked --serviceaccount=fathom-system:fathom-agent",
		}},
		{name: "being deleted", node: dualNode(), peers: []*v1alpha1.BGPPeer{{ObjectMeta: metav1.ObjectMeta{Name: "a", DeletionTimestamp: &metav1.Time{Time: epoch}}}}},
		{name: "bad selector", node: dualNode(), peers: []*v1alpha1.BGPPeer{plain("a", "10.0.0.254", func(s *v1alpha1.BGPPeerSpec) {
			s.NodeSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "rack", Operator: "Like"}}}
		})}, problems: []string{`BGPPeer a: nodeSelector: "Like" is not a valid label selector operator`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, found := Read(tc.peers, tc.node, secrets)
			var got, problems []string
			for _, p := range s.Peers {
				got = append(got, render(p))
			}
			for _, p := range found {
				text := p.String()
				if p.Waits {
					text = "waits: " + text
				}
				problems = append(problems, text)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
			if !slices.Equal(problems, tc.problems) {
				t.Errorf("problems\n%s\nwant\n%s", strings.Join(problems, "\n"), strings.Join(tc.problems, "\n"))
			}
		})
	}
}

// TestReadProperties reads random sets of peers: whatever they say, what comes out can be spoken, and does not depend
// on the order in which the API tells of them.
func TestReadProperties(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	pick := func(list ...string) string { return list[rnd.IntN(len(list))] }
	for range 3000 {
		var peers []*v1alpha1.BGPPeer
		for i := range rnd.IntN(6) {
			peers = append(peers, plain(fmt.Sprint("p", i), pick("10.0.0.254", "10.0.0.253", "10.0.0.1", "fd00::ff", "::1", "x", ""), func(s *v1alpha1.BGPPeerSpec) {
				s.PeerASN, s.LocalASN = rnd.Int64N(5)*1<<30, rnd.Int64N(3)*64512
				s.HoldTimeSeconds, s.KeepaliveTimeSeconds = rnd.Int32N(8), rnd.Int32N(4)
				s.PeerPort = rnd.Int32N(3)
				s.Communities = []string{pick("1:1", "1:2:3", "no-export", "y")}
				s.GracefulRestart = &v1alpha1.BGPGracefulRestart{RestartTimeSeconds: rnd.Int32N(5000)}
			}))
			peers[i].CreationTimestamp = metav1.NewTime(epoch.Add(time.Duration(rnd.IntN(3)) * time.Second))
		}
		s, problems := Read(peers, dualNode(), noSecrets)
		seen := map[netip.AddrPort]bool{}
		for _, p := range s.Peers {
			if seen[p.Address] || p.ASN == 0 || p.LocalASN == 0 || p.HoldTime < 3*time.Second || p.Keepalive < time.Second || p.Keepalive >= p.HoldTime || p.Hops == 0 ||
				p.RestartTime > 4095*time.Second || slices.Contains(dualNode().Addrs, p.Address.Addr()) || len(p.Routes) != 2 {
				t.Errorf("seed %d: cannot be spoken: %s", seed, render(p))
			}
			seen[p.Address] = true
		}
		refused := map[string]bool{}
		for _, p := range problems {
			if p.Refused {
				refused[p.Peer] = true
			}
		}
		if len(refused)+len(s.Peers) != len(peers) {
			t.Errorf("seed %d: of %d peers %d are spoken with and %d refused", seed, len(peers), len(s.Peers), len(refused))
		}
		rnd.Shuffle(len(peers), func(i, j int) { peers[i], peers[j] = peers[j], peers[i] })
		again, same := Read(peers, dualNode(), noSecrets)
		if !reflect.DeepEqual(s, again) || !reflect.DeepEqual(problems, same) {
			t.Fatalf("seed %d: another order gives another result", seed)
		}
	}
}

// TestNextHop: the router of a session reaches the node by the link that both are on.
func TestNextHop(t *testing.T) {
	storage := Node{Addrs: addrs("10.0.0.1", "fd00::1"), Links: []Link{
		{"eth0", prefixes("10.0.0.1/24", "fd00::1/64")},
		{"eth1", prefixes("10.9.0.1/24", "fe80::1/64", "fd00:9::1/64")},
		{"eth2", prefixes("10.8.0.1/24")},
		{"eth3", prefixes("10.9.0.129/25", "fd00:8::1/64")},
	}}
	known := storage
	known.Links = append(slices.Clone(storage.Links), Link{"eth4", prefixes("10.7.0.1/24", "fd00:7::1/64", "fd00::1/128")})
	for _, tc := range []struct {
		node         Node
		router, want string
	}{
		{storage, "10.0.0.254", "fd00::1"},
		{storage, "10.9.0.100", "fd00:9::1"},
		{storage, "10.9.0.254", "fd00:8::1"}, // the longer prefix
		{storage, "fd00:9::fe", "10.9.0.1"},
		{storage, "10.8.0.254", "fd00::1"},  // nothing of that family on the link
		{storage, "203.0.113.1", "fd00::1"}, // some hops away
		{known, "10.7.0.254", "fd00::1"},    // of several the Node's own
		{Node{Addrs: addrs("10.0.0.1"), Links: []Link{{"eth0", prefixes("10.0.0.1/24", "fd00::1/64")}}}, "10.0.0.254", "fd00::1"},
		{storage, "fe80::fe%eth2", "10.8.0.1"},
		{storage, "fe80::fe%eth9", "invalid IP"}, // what other links have is no use to it
		{Node{Addrs: addrs("10.0.0.1")}, "10.0.0.254", "invalid IP"},
		{Node{Addrs: addrs("10.0.0.1", "::ffff:10.0.0.1")}, "10.0.0.254", "invalid IP"},
	} {
		if got := tc.node.nextHop(netip.MustParseAddr(tc.router)); got.String() != tc.want {
			t.Errorf("for %s over the links %v: %s, want %s", tc.router, tc.node.Links, got, tc.want)
		}
	}
	storage.PodCIDRs = prefixes("10.244.1.0/24", "fd00:244:1::/64")
	s, _ := Read([]*v1alpha1.BGPPeer{plain("a", "10.9.0.100")}, storage, noSecrets)
	if got, want := render(s.Peers[0]), "10.244.1.0/24 fd00:244:1::/64 via fd00:9::1"; !strings.HasSuffix(got, want) {
		t.Errorf("it is told %s, want %s", got, want)
	}
}

func TestRouterID(t *testing.T) {
	if id := RouterID("n", addrs("fd00::1", "10.0.0.1", "10.0.0.2")); id != netip.MustParseAddr("10.0.0.1") {
		t.Errorf("router ID %s, want the first IPv4 address", id)
	}
	seen := map[netip.Addr]bool{}
	for i := range 1000 {
		id := RouterID(fmt.Sprint("node", i), addrs("fd00::1"))
		if !id.Is4() || id.As4()[0] < 0xf0 || seen[id] || id != RouterID(fmt.Sprint("node", i), nil) {
			t.Errorf("router ID %s of node%d", id, i)
		}
		seen[id] = true
	}
}

func FuzzParseCommunity(f *testing.F) {
	for _, s := range []string{"64512:100", "64512:1:100", "4294967295:0:4294967295", "no-export", "65536:1", "+1:1", "", ":", "1:", "blackhole"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ParseCommunity(s)
		if err != nil {
			if c != (Community{}) {
				t.Errorf("%q: both %v and %v", s, c, err)
			}
			return
		}
		if again, err := ParseCommunity(c.String()); err != nil || again != c {
			t.Errorf("%q: %v reads as %v, %v", s, c, again, err)
		}
	})
}

func TestPasswordIsHidden(t *testing.T) {
	p := Peer{Password: "tell-nobody"}
	for _, s := range []string{fmt.Sprint(p), fmt.Sprintf("%+v", p), fmt.Sprintf("%#v", p)} {
		if strings.Contains(s, "tell-nobody") {
			t.Errorf("a password is to be read in %s", s)
		}
	}
}
