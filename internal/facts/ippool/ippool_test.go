package ippool_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ippool"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func pool(name string, age int, ranges ...string) *v1alpha1.IPPool {
	p := &v1alpha1.IPPool{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(epoch.Add(-time.Duration(age) * time.Hour))}}
	for _, r := range ranges {
		var size int32
		cidr, bits, found := strings.Cut(r, " ")
		if found {
			if _, err := fmt.Sscan(bits, &size); err != nil {
				panic(err)
			}
		}
		if at := &(v1alpha1.IPPoolRange{CIDR: cidr, BlockSize: size}); strings.Contains(cidr, ":") {
			p.Spec.IPv6 = at
		} else {
			p.Spec.IPv4 = at
		}
	}
	return p
}

func node(name, address string, podCIDRs ...string) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"name": name}},
		Spec:       corev1.NodeSpec{PodCIDRs: podCIDRs},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address}}},
	}
}

func block(pool, node, cidr string) *v1alpha1.IPBlock {
	p := netip.MustParsePrefix(cidr)
	return &v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: ippool.BlockName(p), UID: types.UID(cidr + node)},
		Spec: v1alpha1.IPBlockSpec{Pool: pool, Node: node, CIDR: cidr}}
}

func fixed(b *v1alpha1.IPBlock) *v1alpha1.IPBlock {
	b.Spec.Fixed = true
	return b
}

var services = []*networkingv1.ServiceCIDR{{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: []string{"10.96.0.0/12"}}}}

func TestProblems(t *testing.T) {
	nodes := []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24"), node("b", "10.201.1.3", "10.244.2.0/24")}
	for _, test := range []struct {
		pools []*v1alpha1.IPPool
		want  string // of the first
	}{
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/16")}, ""},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/32")}, ""},
		{[]*v1alpha1.IPPool{pool("default", 1, "10.50.0.0/16")}, "metadata.name: \"default\" is the pool"},
		{[]*v1alpha1.IPPool{pool("p", 1)}, "spec: a pool has a range"},
		{[]*v1alpha1.IPPool{pool("p", 1, "ten")}, `spec.ipv4.cidr: "ten" is no range of IPv4`},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.1/16")}, "spec.ipv4.cidr: 10.50.0.1/16 has bits behind the prefix; want 10.50.0.0/16"},
		{[]*v1alpha1.IPPool{pool("p", 1, "::ffff:10.50.0.0/112")}, `spec.ipv6.cidr: "::ffff:10.50.0.0/112" is no range of IPv6`},
		{[]*v1alpha1.IPPool{pool("p", 1, "0.0.0.0/0")}, "spec.ipv4.cidr: 0.0.0.0/0 overlaps 0.0.0.0/8"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/24 23")}, "spec.ipv4.blockSize: a block of /23 is not a part of 10.50.0.0/24; want 24 to 32"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/24 33")}, "spec.ipv4.blockSize"},
		{[]*v1alpha1.IPPool{pool("p", 1, "fd50::/64")}, "spec.ipv6.cidr: fd50::/64 is IPv6, and no node has podCIDRs of that family"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.97.0.0/16")}, "spec.ipv4.cidr: 10.97.0.0/16 overlaps 10.96.0.0/12 of ServiceCIDR kubernetes"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.244.0.0/16")}, "spec.ipv4.cidr: 10.244.0.0/16 overlaps 10.244.1.0/24, the podCIDR of node a"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.201.0.0/16")}, "spec.ipv4.cidr: 10.201.0.0/16 holds 10.201.1.2, the address of node a"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/16"), pool("old", 2, "10.50.3.0/24")}, "spec.ipv4.cidr: 10.50.0.0/16 overlaps 10.50.3.0/24 of the older pool old"},
		{[]*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/16"), pool("young", 0, "10.50.3.0/24"), pool("bad", 3, "10.0.0.0/8")}, ""},
	} {
		f := ippool.Read(ippool.Objects{Pools: test.pools, Nodes: nodes, Services: services})
		p, found := f.Pool(test.pools[0].Name)
		switch {
		case !found:
			t.Errorf("%+v is not there", test.pools[0].Spec)
		case test.want == "" && p.Problem != nil:
			t.Errorf("%s %v: %s", p.Name, p.Ranges, p.Problem)
		case test.want != "" && (p.Problem == nil || !strings.HasPrefix(p.Problem.String(), test.want)):
			t.Errorf("%s: %v; want %s", p.Name, p.Problem, test.want)
		case test.want != "" && f.Usable(p, "a") == "":
			t.Errorf("%s is used", p.Name)
		}
		status, differs := f.Status(p, epoch)
		if c := status.Conditions[0]; !differs || (c.Status == metav1.ConditionTrue) != (test.want == "") {
			t.Errorf("%+v", c)
		}
		test.pools[0].Status = status
		if _, differs := ippool.Read(ippool.Objects{Pools: test.pools, Nodes: nodes, Services: services}).Status(p, epoch.Add(time.Hour)); differs {
			t.Errorf("the status of %s changes with the clock", p.Name)
		}
	}
}

func TestBlockName(t *testing.T) {
	for prefix, want := range map[string]string{
		"10.50.0.64/26": "10.50.0.64-26", "fd00:50::40/122": "fd00-50-0-0-0-0-0-40-122", "10.50.0.7/32": "10.50.0.7-32",
	} {
		if got := ippool.BlockName(netip.MustParsePrefix(prefix)); got != want {
			t.Errorf("%s: %s, want %s", prefix, got, want)
		}
	}
}

// TestFreeBlock takes blocks until there are none: each comes once, whatever node asks and whatever else is taken.
func TestFreeBlock(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, test := range []struct {
		cidr  string
		bits  int
		other []string
		want  int
	}{
		{"10.50.0.0/24", 26, nil, 4},
		{"10.50.0.0/24", 24, nil, 1},
		{"10.50.0.0/28", 32, nil, 16},
		{"10.50.0.0/24", 26, []string{"10.50.0.7/32", "10.50.0.129/32", "10.50.0.130/31"}, 2},
		{"10.50.0.0/24", 26, []string{"10.50.0.128/25", "10.51.0.0/16"}, 2},
		{"10.50.0.0/24", 26, []string{"10.0.0.0/8"}, 0},
		{"255.255.255.0/24", 28, nil, 16},
		{"fd00:50::/118", 122, []string{"fd00:50::3ff/128"}, 15},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:0/112", 120, nil, 256},
	} {
		r := ippool.Range{Prefix: netip.MustParsePrefix(test.cidr), BlockBits: test.bits}
		var taken []netip.Prefix
		for _, s := range test.other {
			taken = append(taken, netip.MustParsePrefix(s))
		}
		for n := 0; ; n++ {
			p, found := ippool.FreeBlock(r, taken, fmt.Sprint("node", rnd.IntN(100)))
			if !found {
				if n != test.want {
					t.Errorf("%s has %d blocks of /%d beside %v, want %d", test.cidr, n, test.bits, test.other, test.want)
				}
				break
			}
			if p.Bits() != test.bits || p != p.Masked() || !r.Contains(p.Addr()) || slices.ContainsFunc(taken, p.Overlaps) {
				t.Fatalf("%s of %s beside %v", p, test.cidr, taken)
			}
			taken = append(taken, p)
		}
	}
	// A range that is too large to be looked through is not.
	if p, found := ippool.FreeBlock(ippool.Range{Prefix: netip.MustParsePrefix("fd00::/8"), BlockBits: 128}, nil, "a"); !found || p.Bits() != 128 {
		t.Error(p, found)
	}
}

// TestTurn is a table of when blocks are taken and given back.
func TestTurn(t *testing.T) {
	const size = 16
	o := ippool.Objects{Pools: []*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/24 28")}, Nodes: []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24")}}
	held := func(b *v1alpha1.IPBlock, use ...int) ippool.Held {
		x, _, _ := ippool.ReadBlock(b)
		return ippool.Held{Block: x, InUse: use[0], Cooling: use[1], Rested: use[0]+use[1] == 0 && len(use) == 2}
	}
	first, second := block("p", "a", "10.50.0.0/28"), block("p", "a", "10.50.0.16/28")
	for _, test := range []struct {
		name             string
		held             []ippool.Held
		change           func(*v1alpha1.IPPool)
		give, back, take int
	}{
		{name: "nothing"},
		{name: "half full", held: []ippool.Held{held(first, 8, 0)}, give: 1},
		{name: "nearly full", held: []ippool.Held{held(first, 10, 3)}, give: 1, take: 1},
		{name: "a reserve", held: []ippool.Held{held(first, 13, 0), held(second, 0, 0)}, give: 2},
		{name: "a reserve that is not needed", held: []ippool.Held{held(first, 8, 0), held(second, 0, 0)}, give: 1, back: 1},
		{name: "too early", held: []ippool.Held{held(first, 8, 0), held(second, 0, 0, 0)}, give: 2},
		{name: "cooling", held: []ippool.Held{held(first, 2, 0), held(second, 0, 1)}, give: 2},
		{name: "nobody uses it", held: []ippool.Held{held(first, 0, 0), held(second, 0, 0)}, back: 2},
		{name: "a pod is on its way", held: []ippool.Held{held(first, 0, 0, 0)}, give: 1},
		{name: "disabled", held: []ippool.Held{held(first, 8, 0), held(second, 0, 0, 0)}, back: 1, change: func(p *v1alpha1.IPPool) { p.Spec.Disabled = true }},
		{name: "not for this node", held: []ippool.Held{held(first, 15, 0)},
			change: func(p *v1alpha1.IPPool) {
				p.Spec.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"name": "b"}}
			}},
		{name: "of a pool that is gone", held: []ippool.Held{held(block("q", "a", "10.60.0.0/28"), 1, 0), held(block("q", "a", "10.60.0.16/28"), 0, 0)}, back: 1},
		{name: "a pool of another range", held: []ippool.Held{held(block("p", "a", "10.60.0.0/28"), 1, 0)}},
		{name: "fixed", held: []ippool.Held{held(fixed(block("p", "a", "10.50.0.7/32")), 1, 0)}, give: 1},
		{name: "fixed, not used", held: []ippool.Held{held(fixed(block("p", "a", "10.50.0.7/32")), 0, 0)}, back: 1},
	} {
		p := pool("p", 1, "10.50.0.0/24 28")
		if test.change != nil {
			test.change(p)
		}
		o.Pools = []*v1alpha1.IPPool{p}
		turn := ippool.Read(o).Turn("a", test.held)
		give := 0
		for _, g := range turn.Give {
			give += len(g.Ranges) + len(g.Fixed)
			if !g.ExplicitOnly || !g.Whole {
				t.Errorf("%s: %+v", test.name, g)
			}
		}
		if give != test.give || len(turn.Back) != test.back || len(turn.Take) != test.take {
			t.Errorf("%s: %+v; want %d, %d, %d", test.name, turn, test.give, test.back, test.take)
		}
	}
	// What was decided is not undone by deciding again.
	for use := range size + 1 {
		f := ippool.Read(o)
		blocks := []ippool.Held{held(first, use, 0)}
		for range 3 {
			turn := f.Turn("a", blocks)
			if len(turn.Take)*len(turn.Back) > 0 {
				t.Fatalf("%d in use: %+v", use, turn)
			}
			if len(turn.Take) > 0 {
				blocks = append(blocks, held(second, 0, 0))
				if again := f.Turn("a", blocks); len(again.Take)+len(again.Back) > 0 {
					t.Fatalf("%d in use: %+v after %+v", use, again, turn)
				}
			}
		}
	}
}

func TestDecide(t *testing.T) {
	restricted := pool("restricted", 1, "10.60.0.0/24")
	restricted.Spec.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "x"}}
	restricted.Spec.NodeSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"name": "a"}}
	off := pool("off", 1, "10.61.0.0/24")
	off.Spec.Disabled = true
	f := ippool.Read(ippool.Objects{
		Pools:  []*v1alpha1.IPPool{pool("public", 1, "10.50.0.0/24", "fd50::/64"), restricted, off, pool("bad", 1, "10.96.0.0/24")},
		Nodes:  []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24", "fd00:1::/64"), node("b", "10.201.1.3", "10.244.2.0/24", "fd00:2::/64")},
		Blocks: []*v1alpha1.IPBlock{block("public", "a", "10.50.0.0/26"), block("public", "b", "10.50.0.64/26")}, Services: services,
	})
	for _, test := range []struct {
		name           string
		pod, namespace map[string]string
		labels         map[string]string
		node           string
		want           string // pool, addresses, number of fixed and of ordinary ones
		err            string
		later          bool
	}{
		{name: "nothing", want: " [] 0 0"},
		{name: "a pool", pod: map[string]string{ippool.PoolAnnotation: "public"}, want: "public [] 0 2"},
		{name: "of the namespace", namespace: map[string]string{ippool.PoolAnnotation: "public"}, want: "public [] 0 2"},
		{name: "not of the namespace", pod: map[string]string{ippool.PoolAnnotation: "default"}, namespace: map[string]string{ippool.PoolAnnotation: "public"}, want: "default [] 0 0"},
		{name: "unknown", pod: map[string]string{ippool.PoolAnnotation: "x"}, err: `annotation fathom.network/pool of the pod: there is no IPPool "x"; there are bad, off, public, restricted`},
		{name: "malformed", pod: map[string]string{ippool.PoolAnnotation: "a b"}, err: `"a b" is no name of a pool`},
		{name: "empty", pod: map[string]string{ippool.PoolAnnotation: ""}, err: `"" is no name of a pool`},
		{name: "invalid", pod: map[string]string{ippool.PoolAnnotation: "bad"}, err: `pool "bad" is not used: spec.ipv4.cidr: 10.96.0.0/24 overlaps`},
		{name: "disabled", pod: map[string]string{ippool.PoolAnnotation: "off"}, err: `pool "off" is disabled`},
		{name: "another's", pod: map[string]string{ippool.PoolAnnotation: "restricted"}, err: `pool "restricted" is not for pods of namespace ns: its namespaceSelector is team=x`},
		{name: "ours", pod: map[string]string{ippool.PoolAnnotation: "restricted"}, labels: map[string]string{"team": "x"}, want: "restricted [] 0 1"},
		{name: "on another node", node: "b", pod: map[string]string{ippool.PoolAnnotation: "restricted"}, labels: map[string]string{"team": "x"}, err: "is not for node b: its nodeSelector is name=a"},
		{name: "an address of our block", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0.7"}, want: "public [10.50.0.7] 0 1"},
		{name: "two addresses", pod: map[string]string{ippool.AddressesAnnotation: " 10.50.0.7 , fd50::7 "}, want: "public [10.50.0.7 fd50::7] 1 0"},
		{name: "of nobody's block", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0.200"}, want: "public [10.50.0.200] 1 1"},
		{name: "of another's block", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0.77"}, err: "10.50.0.77 is in block 10.50.0.64/26 of node b", later: true},
		{name: "of no pool", pod: map[string]string{ippool.AddressesAnnotation: "192.0.2.1"}, err: "192.0.2.1 is in no node's podCIDR and in no IPPool"},
		{name: "of two pools", pod: map[string]string{ippool.AddressesAnnotation: "10.60.0.1,fd50::7"}, labels: map[string]string{"team": "x"}, err: `fd50::7 is not in pool "restricted", which has 10.60.0.0/24`},
		{name: "of the node", pod: map[string]string{ippool.AddressesAnnotation: "10.244.1.7"}, want: "default [10.244.1.7] 0 0"},
		{name: "of another node", pod: map[string]string{ippool.AddressesAnnotation: "10.244.2.7"}, err: "10.244.2.7 is in the podCIDR of node b, and the pod is on node a"},
		{name: "no address", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0"}, err: `"10.50.0" is no address`},
		{name: "nothing between commas", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0.7,"}, err: `"" is no address`},
		{name: "a zone", pod: map[string]string{ippool.AddressesAnnotation: "fe80::1%eth0"}, err: "is no address"},
		{name: "two of a family", pod: map[string]string{ippool.AddressesAnnotation: "10.50.0.7,10.50.0.8"}, err: "both IPv4"},
		{name: "not in the pool", pod: map[string]string{ippool.PoolAnnotation: "public", ippool.AddressesAnnotation: "10.51.0.7"}, err: `10.51.0.7 is not in pool "public", which has 10.50.0.0/24 and fd50::/64`},
	} {
		if test.node == "" {
			test.node = "a"
		}
		w, err := ippool.ParseWish(test.pod, test.namespace)
		var g ippool.Grant
		if err == nil {
			g, err = f.Decide(w, test.node, "ns", test.labels)
		}
		var refusal *ippool.Refusal
		switch {
		case test.err == "" && err != nil:
			t.Errorf("%s: %v", test.name, err)
		case test.err != "" && (!errors.As(err, &refusal) || !strings.Contains(err.Error(), test.err) || refusal.Later != test.later):
			t.Errorf("%s: %+v, %v; want %s", test.name, g, err, test.err)
		case test.err == "":
			if got := fmt.Sprintf("%s %v %d %d", g.Pool, g.Addresses, len(g.Fixed), len(g.Ordinary)); got != test.want {
				t.Errorf("%s: %s; want %s", test.name, got, test.want)
			}
		}
	}
}

func FuzzParseWish(f *testing.F) {
	for _, s := range [][3]string{{"public", "10.50.0.7, fd00::7", ""}, {"", "", "default"}, {"a.b-c", "::ffff:10.0.0.1,fe80::1%x", "-"}, {"x", ",", "x"}} {
		f.Add(s[0], s[1], s[2])
	}
	facts := ippool.Read(ippool.Objects{Pools: []*v1alpha1.IPPool{pool("public", 1, "10.50.0.0/24", "fd00::/64")},
		Nodes: []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24", "fd01::/64")}})
	f.Fuzz(func(t *testing.T, podPool, addresses, namespacePool string) {
		w, err := ippool.ParseWish(map[string]string{ippool.PoolAnnotation: podPool, ippool.AddressesAnnotation: addresses}, map[string]string{ippool.PoolAnnotation: namespacePool})
		if err != nil {
			if w.Pool != "" || w.Addresses != nil || len(err.Error()) > 1024 {
				t.Errorf("both %+v and %v", w, err)
			}
			return
		}
		if len(w.Addresses) == 0 || len(w.Addresses) > 2 || w.Pool == "" {
			t.Errorf("%q %q: %+v", podPool, addresses, w)
		}
		g, err := facts.Decide(w, "a", "ns", nil)
		if err == nil && !slices.Equal(g.Addresses, w.Addresses) {
			t.Errorf("%+v for %+v", g, w)
		}
		for _, a := range g.Fixed {
			if !netip.MustParsePrefix("10.50.0.0/24").Contains(a) && !netip.MustParsePrefix("fd00::/64").Contains(a) {
				t.Errorf("%s is to be taken", a)
			}
		}
	})
}
