package announcing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// TestAnswers: n1 and n2 are on one segment, n3 is behind a router.
func TestAnswers(t *testing.T) {
	segments := map[string][]podnet.Segment{
		"n1": {{Device: "eth0", Prefix: netip.MustParsePrefix("192.0.2.1/24")}, {Device: "eth0", Prefix: netip.MustParsePrefix("2001:db8::1/64")}},
		"n2": {{Device: "ens3", Prefix: netip.MustParsePrefix("192.0.2.2/24")}, {Device: "ens3", Prefix: netip.MustParsePrefix("2001:db8::2/64")}},
		"n3": {{Device: "eth0", Prefix: netip.MustParsePrefix("198.51.100.3/24")}},
	}
	node := func(name, addr string, alive bool) vip.Node {
		return vip.Node{Name: name, Alive: alive, Addrs: []netip.Addr{netip.MustParseAddr(addr)}}
	}
	all := func(n2 bool) []vip.Node {
		return []vip.Node{node("n1", "192.0.2.1", true), node("n2", "192.0.2.2", n2), node("n3", "198.51.100.3", true)}
	}
	pools := poolsOf("192.0.2.64/26", "2001:db8::/64")
	balanced := func(local bool, nodes []string, addrs ...string) service.LoadBalanced {
		l := service.LoadBalanced{Service: service.Name{Name: "web"}, Local: local, Nodes: nodes}
		for _, a := range addrs {
			l.Addrs = append(l.Addrs, netip.MustParseAddr(a))
		}
		return l
	}
	for name, tc := range map[string]struct {
		nodes     []vip.Node
		balancers []service.LoadBalanced
		answer    int // how many nodes answer for each address, together
		routed    []string
		by        string // who answers, if it is to be one
	}{
		"one of those on the segment":    {all(true), []service.LoadBalanced{balanced(false, nil, "192.0.2.80")}, 1, []string{"n1", "n2", "n3"}, ""},
		"IPv6 of nodes with IPv4 alone":  {all(true), []service.LoadBalanced{balanced(false, nil, "2001:db8::80")}, 1, []string{"n1", "n2", "n3"}, ""},
		"the one that is left":           {all(false), []service.LoadBalanced{balanced(false, nil, "192.0.2.80")}, 1, []string{"n1", "n3"}, "n1"},
		"the one with an endpoint":       {all(true), []service.LoadBalanced{balanced(true, []string{"n2", "n3"}, "192.0.2.80")}, 1, []string{"n2", "n3"}, "n2"},
		"none of those with an endpoint": {all(true), []service.LoadBalanced{balanced(true, []string{"n3"}, "192.0.2.80")}, 0, []string{"n3"}, ""},
		"no endpoint":                    {all(true), []service.LoadBalanced{balanced(true, nil, "192.0.2.80")}, 0, nil, ""},
		"an external IP":                 {all(true), []service.LoadBalanced{{ExternalIPs: []netip.Addr{netip.MustParseAddr("192.0.2.81")}}}, 1, []string{"n1", "n2", "n3"}, ""},
		"an external IP, Local":          {all(true), []service.LoadBalanced{{ExternalIPs: []netip.Addr{netip.MustParseAddr("192.0.2.81")}, Local: true, Nodes: []string{"n2"}}}, 1, []string{"n2"}, "n2"},
		"a ClusterIP":                    {all(true), []service.LoadBalanced{{ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")}}}, 0, []string{"n1", "n2", "n3"}, ""},
		"a ClusterIP, Local":             {all(true), []service.LoadBalanced{{ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")}, LocalInside: true, NodesInside: []string{"n3"}}}, 0, []string{"n3"}, ""},
		"of no pool":                     {all(true), []service.LoadBalanced{balanced(false, nil, "192.0.2.9")}, 0, nil, ""},
	} {
		count := 0
		var routed []string
		for self, on := range segments {
			f := vip.Facts{Node: self, Pools: pools, Balancers: tc.balancers, Nodes: tc.nodes, Segments: on}
			if self == "n2" && !tc.nodes[1].Alive {
				continue
			}
			verdicts := f.Judge()
			answers, prefixes := vip.Answered(verdicts), toRouters(f, verdicts)
			count += len(answers)
			if len(answers) > 0 && tc.by != "" && tc.by != self {
				t.Errorf("%s: %s answers, and not %s", name, self, tc.by)
			}
			if len(prefixes) > 0 {
				routed = append(routed, self)
			}
		}
		slices.Sort(routed)
		if count != tc.answer || !slices.Equal(routed, tc.routed) {
			t.Errorf("%s: %d nodes answer, and %v are routed to; want %d and %v", name, count, routed, tc.answer, tc.routed)
		}
	}
}

// poolsOf is an AddressPool of these ranges.
func poolsOf(ranges ...string) vip.Pools {
	return vip.Read(vip.Objects{Pools: []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "office", Labels: map[string]string{"site": "a"}}, Spec: v1alpha1.AddressPoolSpec{Addresses: ranges}}}})
}

// TestRoutedAddresses: what routers may be told carries what BGPPeers choose by.
func TestRoutedAddresses(t *testing.T) {
	web := service.LoadBalanced{Service: service.Name{Name: "web"}, Labels: map[string]string{"app": "web"}, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.80")},
		ExternalIPs: []netip.Addr{netip.MustParseAddr("192.0.2.81")}, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")}}
	shared := service.LoadBalanced{Service: service.Name{Name: "shared"}, Addrs: web.Addrs}
	f := vip.Facts{Node: "n1", Pools: poolsOf("192.0.2.64/26"), Balancers: []service.LoadBalanced{shared, web}, Nodes: []vip.Node{{Name: "n1", Alive: true}}}
	var got []string
	for _, a := range toRouters(f, f.Judge()) {
		got = append(got, fmt.Sprintf("%s %s of %s {%s}, pool %s {%s}", a.Kind, a.Addr, a.Service.Name, a.Labels, a.Pool, a.PoolLabels))
	}
	want := []string{"ClusterIP 10.96.0.9 of web {app=web}, pool  {}", "LoadBalancerIP 192.0.2.80 of shared {}, pool office {site=a}",
		"LoadBalancerIP 192.0.2.80 of web {app=web}, pool office {site=a}", "ExternalIP 192.0.2.81 of web {app=web}, pool office {site=a}"}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestStandIn: while the agent of the node that answers is away, another one of the segment says so, endpoint or not.
func TestStandIn(t *testing.T) {
	segment := []podnet.Segment{{Device: "eth0", Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	addr := netip.MustParseAddr("192.0.2.80")
	local := service.LoadBalanced{Service: service.Name{Name: "web"}, Local: true, Nodes: []string{"n2"}, Addrs: []netip.Addr{addr}}
	for name, tc := range map[string]struct {
		away, dead []string
		answers    string // who answers as itself
		by         string // who answers for another
	}{
		"there":         {nil, nil, "n2", ""},
		"away":          {[]string{"n2"}, nil, "", "n1"},
		"another away":  {[]string{"n1"}, nil, "n2", ""},
		"all away":      {[]string{"n1", "n2"}, nil, "", ""},
		"the rest dead": {[]string{"n2"}, []string{"n1"}, "", ""},
		"dead":          {nil, []string{"n2"}, "", ""},
	} {
		f := vip.Facts{Pools: poolsOf("192.0.2.64/26"), Balancers: []service.LoadBalanced{local}, Segments: segment}
		for i, n := range []string{"n1", "n2", "n3"} {
			at := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
			if n == "n3" { // behind a router
				at = netip.MustParseAddr("198.51.100.3")
			}
			f.Nodes = append(f.Nodes, vip.Node{Name: n, Alive: !slices.Contains(tc.dead, n), Addrs: []netip.Addr{at}, Away: slices.Contains(tc.away, n)})
		}
		for _, self := range []string{"n1", "n2"} {
			if slices.Contains(tc.away, self) || slices.Contains(tc.dead, self) {
				continue
			}
			f.Node = self
			v := f.Judge()[0]
			if v.Answers != (tc.answers == self) || v.StandIn != tc.by {
				t.Errorf("%s: to %s, it answers itself: %v, and %q answers for another; want %q and %q", name, self, v.Answers, v.StandIn, tc.answers, tc.by)
			}
		}
	}
	b := Balancer{node: "n1", neighbour: func(device string, a netip.Addr) (net.HardwareAddr, error) {
		if device != "eth0" || a.String() != "192.0.2.2" {
			return nil, errors.New("asked for something else")
		}
		return net.HardwareAddr{2, 0, 0, 0, 0, 2}, nil
	}}
	facts := vip.Facts{Nodes: []vip.Node{{Name: "n2", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.2")}}}}
	for _, devices := range [][]string{{"eth0"}, {"eth0", "eth1"}, nil} {
		b.verdicts = []vip.Verdict{{Address: addr, Devices: devices, Announcer: "n2", StandIn: "n1"}, {Address: addr, Devices: devices, Announcer: "n2", StandIn: "n4"}}
		got, err := b.standIns(facts)
		if want := len(devices) == 1; err != nil || (len(got) == 1) != want || want && got[0].MAC.String() != "02:00:00:00:00:02" {
			t.Errorf("on %v: %v, %v", devices, got, err)
		}
	}
}

// TestMembersOf: agents listen at InternalIPs. The ExternalIP is first in the order of addresses here.
func TestMembersOf(t *testing.T) {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	n.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeExternalIP, Address: "192.0.2.1"},
		{Type: corev1.NodeInternalIP, Address: "198.51.100.1"},
		{Type: corev1.NodeInternalIP, Address: "2001:db8::1"},
	}
	if got, want := fmt.Sprint(membersOf([]*corev1.Node{n})), "map[n1:[198.51.100.1 2001:db8::1]]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// fakeSource is a cluster of which a balancer is told.
type fakeSource struct {
	nodes     []*corev1.Node
	pools     []*v1alpha1.AddressPool
	balancers []service.LoadBalanced
	known     bool
	keys      [][]byte
	noKeys    error
	inner     bool
}

func (s *fakeSource) Nodes() []*corev1.Node                         { return s.nodes }
func (s *fakeSource) AddressPools() []*v1alpha1.AddressPool         { return s.pools }
func (s *fakeSource) LoadBalancers() ([]service.LoadBalanced, bool) { return s.balancers, s.known }
func (s *fakeSource) TellsClusterIPs() bool                         { return s.inner }
func (s *fakeSource) Keys(context.Context) ([][]byte, error)        { return s.keys, s.noKeys }

// TestBalancerWithoutKey goes by the nodes' conditions, and leaves what is said as it is while nothing is known.
func TestBalancerWithoutKey(t *testing.T) {
	here, err := link.Here()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	node := func(name, addr string, ready corev1.ConditionStatus) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{netfacts.ModeAnnotation: "auto"}}}
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}
		return n
	}
	source := &fakeSource{noKeys: errors.New("there is none"), pools: []*v1alpha1.AddressPool{{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: v1alpha1.AddressPoolSpec{Addresses: []string{"192.0.2.64/26"}}}}}
	changed := 0
	b := &Balancer{node: "n1", log: slog.New(slog.NewTextHandler(t.Output(), nil)), resync: time.Hour, source: source, changed: func() { changed++ }, kick: wake.New(),
		keys: make(chan foundKeys, 1), speaker: announce.New(here, slog.New(slog.DiscardHandler)), count: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "x"}, []string{"how"})}
	defer b.speaker.Close()
	says := func(step string, wantKnown bool, want string, wantChanged int) {
		t.Helper()
		list, known := b.Routed(false)
		routed := []netip.Addr{}
		for _, a := range list {
			routed = append(routed, a.Addr)
		}
		if fmt.Sprint(routed) != want || known != wantKnown || changed != wantChanged {
			t.Errorf("%s: %v, known %v, changed %d; want %s, %v, %d", step, routed, known, changed, want, wantKnown, wantChanged)
		}
	}
	b.step(t.Context())
	says("without a place", false, "[]", 0)
	source.nodes = []*corev1.Node{node("n1", "198.51.100.1", corev1.ConditionTrue), node("n2", "198.51.100.2", corev1.ConditionTrue)}
	b.Set(podnet.Node{Addrs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}}, nil)
	b.step(t.Context())
	says("before the key was asked for", false, "[]", 0)
	for !b.isAsked {
		b.step(t.Context())
	}
	says("before Services are known", false, "[]", 0)
	source.balancers, source.known = []service.LoadBalanced{{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.80")}}}, true
	b.step(t.Context())
	says("a Service", true, "[192.0.2.80]", 1)
	b.step(t.Context())
	says("again", true, "[192.0.2.80]", 1)
	source.nodes[0] = node("n1", "198.51.100.1", corev1.ConditionUnknown)
	b.step(t.Context())
	says("not Ready", true, "[]", 2)
	source.nodes[0] = node("n1", "198.51.100.1", corev1.ConditionTrue)
	b.step(t.Context())
	source.balancers, source.known = nil, false
	b.step(t.Context())
	says("nothing known any more", true, "[192.0.2.80]", 3)
	source.pools = nil
	b.step(t.Context())
	says("no pools", true, "[]", 4)
	if _, known := b.Routed(true); known {
		t.Error("ClusterIPs are said to be known, of which nothing was told")
	}
	source.balancers, source.known, source.inner = []service.LoadBalanced{{ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.9")}}}, true, true
	b.step(t.Context())
	says("a ClusterIP", true, "[10.96.0.9]", 5)
	if _, known := b.Routed(true); !known {
		t.Error("ClusterIPs are said not to be known")
	}
}
