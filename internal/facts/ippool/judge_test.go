package ippool_test

import (
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

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ippool"
)

// at makes an object that many hours old.
func at[T metav1.Object](o T, age int) T {
	o.SetCreationTimestamp(metav1.NewTime(epoch.Add(-time.Duration(age) * time.Hour)))
	return o
}

func addresses(name string, ranges ...string) *v1alpha1.AddressPool {
	return &v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.AddressPoolSpec{Addresses: ranges}}
}

func serviceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs}}
}

// TestRefused is what blocks are not used for, whoever wrote them. The first block of each row is asked for.
func TestRefused(t *testing.T) {
	nodes := []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24", "fd00:244:1::/64"), node("b", "10.201.1.3", "10.244.2.0/24", "fd00:244:2::/64")}
	good := []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16 26", "fd50::/64")}
	deleted := pool("p", 9, "10.50.0.0/16")
	now := metav1.NewTime(epoch)
	deleted.DeletionTimestamp, deleted.Finalizers = &now, []string{ippool.Finalizer}
	broken := pool("p", 9, "10.50.0.0/16")
	broken.Spec.NodeSelector = &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "x", Operator: "Near"}}}
	for _, test := range []struct {
		name     string
		pools    []*v1alpha1.IPPool
		blocks   []*v1alpha1.IPBlock
		services []*networkingv1.ServiceCIDR
		balance  []*v1alpha1.AddressPool
		nodes    []*corev1.Node // besides a and b
		want     string         // reason and text; nothing if it is used
	}{
		{name: "a block", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.3.64/26")}},
		{name: "of IPv6", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "fd50::40/122")}},
		{name: "a fixed address", pools: good, blocks: []*v1alpha1.IPBlock{fixed(block("p", "a", "10.50.3.7/32"))}},
		{name: "a pool of one block", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/28")}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/28")}},

		{name: "Services' own", blocks: []*v1alpha1.IPBlock{block("p", "a", "10.96.0.0/12")}, want: "UnknownPool there is no such IPPool"},
		{name: "an eighth of everything", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "64.0.0.0/3")}, want: "NotOfPool it is not within 10.50.0.0/16"},
		{name: "a single foreign address", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "198.51.100.10/32")}, want: "NotOfPool it is not within"},
		{name: "a fixed foreign address", pools: good, blocks: []*v1alpha1.IPBlock{fixed(block("p", "a", "198.51.100.10/32"))}, want: "NotOfPool it is not within"},
		{name: "around the pool", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.48.0.0/12")}, want: "NotOfPool it is not within"},
		{name: "of another pool's range", pools: append([]*v1alpha1.IPPool{pool("q", 9, "10.60.0.0/16")}, good...), blocks: []*v1alpha1.IPBlock{block("p", "a", "10.60.0.0/26")}, want: "NotOfPool it is not within"},
		{name: "of another family", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, blocks: []*v1alpha1.IPBlock{block("p", "a", "fd50::40/122")}, want: "NotOfPool the pool has no IPv6"},
		{name: "the whole pool", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/16")}, want: "WrongSize blocks of the pool are of /26"},
		{name: "too small", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/27")}, want: "WrongSize blocks of the pool are of /26"},
		{name: "one address, not fixed", pools: good, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.7/32")}, want: "WrongSize blocks of the pool are of /26"},
		{name: "many fixed addresses", pools: good, blocks: []*v1alpha1.IPBlock{fixed(block("p", "a", "10.50.0.0/26"))}, want: "WrongSize it is said to be a fixed address, and is several"},
		{name: "another name", pools: good, blocks: []*v1alpha1.IPBlock{{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: v1alpha1.IPBlockSpec{Pool: "p", Node: "a", CIDR: "10.50.0.0/26"}}}, want: `InvalidField it has the CIDR "10.50.0.0/26"`},
		{name: "no CIDR", pools: good, blocks: []*v1alpha1.IPBlock{{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: v1alpha1.IPBlockSpec{Pool: "p", Node: "a", CIDR: "x"}}}, want: `InvalidField`},
		{name: "the nodes' own pool", pools: []*v1alpha1.IPPool{pool("default", 9, "10.50.0.0/16")}, blocks: []*v1alpha1.IPBlock{block("default", "a", "10.50.0.0/26")}, want: "ReservedName"},
		{name: "a pool without a range", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.1/16")}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}, want: "NotOfPool spec.ipv4.cidr: 10.50.0.1/16 has bits"},

		{name: "of a pool that overlaps Services, in their range", pools: []*v1alpha1.IPPool{pool("p", 1, "10.0.0.0/8")}, services: services,
			blocks: []*v1alpha1.IPBlock{at(block("p", "a", "10.96.0.0/26"), 1)}, want: "ServiceOverlap overlaps 10.96.0.0/12 of ServiceCIDR kubernetes"},
		{name: "of a pool that overlaps load balancers, in their range", pools: []*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/16")}, balance: []*v1alpha1.AddressPool{at(addresses("lb", "10.50.0.9-10.50.0.12"), 1)},
			blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}, want: "BalancerOverlap overlaps 10.50.0.9-10.50.0.12 of AddressPool lb"},
		{name: "of a pool that overlaps nodes, with an address of one", pools: []*v1alpha1.IPPool{pool("p", 1, "10.201.0.0/16")},
			blocks: []*v1alpha1.IPBlock{block("p", "a", "10.201.1.0/26")}, want: "NodeAddressClash holds 10.201.1.2, the address of node a"},
		{name: "of a pool that overlaps a podCIDR, in it", pools: []*v1alpha1.IPPool{pool("p", 1, "10.244.0.0/16")},
			blocks: []*v1alpha1.IPBlock{block("p", "b", "10.244.1.64/26")}, want: "Overlap overlaps 10.244.1.0/24, the podCIDR of node a"},

		{name: "within an older block", pools: good, blocks: []*v1alpha1.IPBlock{at(fixed(block("p", "b", "10.50.0.7/32")), 1), at(block("p", "a", "10.50.0.0/26"), 2)}, want: "Overlap it overlaps 10.50.0.0/26 of node a, which was there first"},
		{name: "around an older address", pools: good, blocks: []*v1alpha1.IPBlock{at(block("p", "b", "10.50.0.0/26"), 1), at(fixed(block("p", "a", "10.50.0.7/32")), 2)}, want: "Overlap it overlaps 10.50.0.7/32 of node a"},
		{name: "around a younger address", pools: good, blocks: []*v1alpha1.IPBlock{at(block("p", "a", "10.50.0.0/26"), 2), at(fixed(block("p", "b", "10.50.0.7/32")), 1)}},
		{name: "around an address of the same second", pools: good, blocks: []*v1alpha1.IPBlock{at(block("p", "b", "10.50.0.0/26"), 1), at(fixed(block("p", "a", "10.50.0.7/32")), 1)}},
		{name: "around an older one that is refused", pools: good, blocks: []*v1alpha1.IPBlock{at(block("p", "b", "10.50.0.0/26"), 1), at(block("q", "a", "10.50.0.0/25"), 2)}},

		// What comes to be wrong with a pool cuts none of its pods off, unless it is with their own block.
		{name: "of a pool that is being deleted", pools: []*v1alpha1.IPPool{deleted}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "of a pool with a selector that nobody can read", pools: []*v1alpha1.IPPool{broken}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "beside a new node's range", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, nodes: []*corev1.Node{node("c", "10.201.1.4", "10.50.1.0/24")}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "beside a new node's address", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, nodes: []*corev1.Node{node("c", "10.50.1.4", "10.244.3.0/24")}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "with a younger ServiceCIDR", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, services: []*networkingv1.ServiceCIDR{at(serviceCIDR("more", "10.50.0.0/24"), 1)}, blocks: []*v1alpha1.IPBlock{at(block("p", "a", "10.50.0.0/26"), 2)}},
		{name: "after the ServiceCIDR", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, services: []*networkingv1.ServiceCIDR{at(serviceCIDR("more", "10.50.0.0/24"), 2)}, blocks: []*v1alpha1.IPBlock{at(block("p", "a", "10.50.0.0/26"), 1)},
			want: "ServiceOverlap"},
		{name: "made before there was a pool, or the ServiceCIDR", pools: []*v1alpha1.IPPool{pool("p", 1, "10.50.0.0/16")}, services: []*networkingv1.ServiceCIDR{at(serviceCIDR("more", "10.50.0.0/24"), 2)}, blocks: []*v1alpha1.IPBlock{at(block("p", "a", "10.50.0.0/26"), 3)},
			want: "ServiceOverlap"},
		{name: "with a younger AddressPool, which gives way", pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/16")}, balance: []*v1alpha1.AddressPool{at(addresses("lb", "10.50.0.0/24"), 1)}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "of a younger pool that gives way", pools: append([]*v1alpha1.IPPool{pool("q", 10, "10.50.0.0/24 28")}, good...), blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
	} {
		o := ippool.Objects{Pools: test.pools, Blocks: test.blocks, Services: test.services, AddressPools: test.balance, Nodes: append(slices.Clone(nodes), test.nodes...)}
		f := ippool.Read(o)
		is := ""
		for _, r := range f.Refused {
			if r.Name == test.blocks[0].Name {
				is = r.Reason + " " + r.Text
			}
		}
		used := slices.ContainsFunc(f.Blocks, func(b ippool.Block) bool { return b.Name == test.blocks[0].Name })
		switch {
		case used == (is != ""), used != (test.want == ""), !strings.HasPrefix(is, test.want):
			t.Errorf("%s: used %v, %q; want %q", test.name, used, is, test.want)
		}
	}
}

// TestRefusedTakesNothing: a block that is refused does not keep others from a pool, unless it may be left of an earlier one.
func TestRefusedTakesNothing(t *testing.T) {
	o := ippool.Objects{Pools: []*v1alpha1.IPPool{pool("p", 9, "10.50.0.0/24 26")}, Nodes: []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24")},
		Blocks: []*v1alpha1.IPBlock{block("x", "b", "0.0.0.0/1"), block("x", "b", "10.50.0.0/16"), block("p", "b", "10.50.0.0/26"), block("x", "b", "10.50.0.128/25")}}
	f := ippool.Read(o)
	if got, want := fmt.Sprint(f.Taken()), "[10.50.0.0/26 10.50.0.128/25]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if p, found := ippool.FreeBlock(f.Pools[0].Ranges[0], f.Taken(), "a"); !found || p.String() != "10.50.0.64/26" {
		t.Error(p, found)
	}
}

// TestJudgeAny judges blocks of any kind: whatever is used harms nobody, in whatever order objects come, and those that are
// refused make no difference.
func TestJudgeAny(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	any4 := func() netip.Addr {
		return netip.AddrFrom4([4]byte{10, byte(48 + rnd.IntN(6)), byte(rnd.IntN(4)), byte(rnd.IntN(256))})
	}
	prefix := func(least int) string { return netip.PrefixFrom(any4(), least+rnd.IntN(33-least)).Masked().String() }
	usedAny, refusedAny := 0, 0
	for range 2000 {
		o := ippool.Objects{Nodes: []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24")}}
		for i := range rnd.IntN(4) {
			bits := 12 + rnd.IntN(13)
			o.Pools = append(o.Pools, pool(fmt.Sprint("p", i), rnd.IntN(4), fmt.Sprintf("%s %d", netip.PrefixFrom(any4(), bits).Masked(), bits+rnd.IntN(33-bits))))
		}
		for i := range rnd.IntN(3) {
			o.Services = append(o.Services, at(serviceCIDR(fmt.Sprint("s", i), prefix(20)), rnd.IntN(4)))
			o.AddressPools = append(o.AddressPools, at(addresses(fmt.Sprint("l", i), prefix(20)), rnd.IntN(4)))
			o.Nodes = append(o.Nodes, node(fmt.Sprint("n", i), any4().String(), prefix(22)))
		}
		names := map[string]bool{}
		for range rnd.IntN(12) {
			size, of := prefix(8), fmt.Sprint("p", rnd.IntN(4))
			if len(o.Pools) > 0 && rnd.IntN(3) > 0 { // a likely one
				likely := o.Pools[rnd.IntN(len(o.Pools))]
				from := likely.Spec.IPv4
				if of = likely.Name; rnd.IntN(8) == 0 {
					of = "p0"
				}
				p := netip.MustParsePrefix(from.CIDR)
				b := p.Addr().As4()
				b[2], b[3] = b[2]|byte(rnd.IntN(256)), byte(rnd.IntN(256))
				bits := int(from.BlockSize)
				if rnd.IntN(3) == 0 {
					bits = 32
				}
				size = netip.PrefixFrom(netip.AddrFrom4(b), bits).Masked().String()
			}
			b := at(block(of, []string{"a", "b"}[rnd.IntN(2)], size), rnd.IntN(4))
			b.Spec.Fixed = rnd.IntN(3) == 0
			if !names[b.Name] { // as the API server has it
				names[b.Name] = true
				o.Blocks = append(o.Blocks, b)
			}
		}
		f := ippool.Read(o)
		if len(f.Blocks)+len(f.Refused) != len(o.Blocks) {
			t.Fatalf("%d used and %d refused of %d", len(f.Blocks), len(f.Refused), len(o.Blocks))
		}
		usedAny, refusedAny = usedAny+len(f.Blocks), refusedAny+len(f.Refused)
		for i, b := range f.Blocks {
			p, found := f.Pool(b.Pool)
			r, inFamily := p.Range(inet.IPv4)
			if !found || !inFamily || !r.Contains(b.Addr()) || b.Bits() != r.BlockBits && (!b.Fixed || b.Bits() != 32) {
				t.Fatalf("%+v is used of %+v", b, p)
			}
			for _, other := range f.Blocks[:i] {
				if other.Overlaps(b.Prefix) {
					t.Fatalf("%s and %s are used", other.Prefix, b.Prefix)
				}
			}
			harms := func(what, cidr string, created metav1.Time, since time.Time) {
				if netip.MustParsePrefix(cidr).Overlaps(b.Prefix) && !created.After(since) {
					t.Fatalf("%+v is used, and overlaps %s %s", b, what, cidr)
				}
			}
			for _, s := range o.Services {
				harms("Services'", s.Spec.CIDRs[0], s.CreationTimestamp, slices.MaxFunc([]time.Time{b.Created, p.Created()}, time.Time.Compare))
			}
			for _, l := range o.AddressPools {
				harms("load balancers'", l.Spec.Addresses[0], l.CreationTimestamp, p.Created())
			}
			for _, n := range o.Nodes {
				harms("a node's", n.Spec.PodCIDRs[0], metav1.Time{}, epoch)
				harms("a node's own", n.Status.Addresses[0].Address+"/32", metav1.Time{}, epoch)
			}
		}
		text := func(f ippool.Facts) string { return fmt.Sprint(f.Blocks) }
		again := o
		again.Blocks, again.Pools, again.Nodes = slices.Clone(o.Blocks), slices.Clone(o.Pools), slices.Clone(o.Nodes)
		rnd.Shuffle(len(again.Blocks), func(i, j int) { again.Blocks[i], again.Blocks[j] = again.Blocks[j], again.Blocks[i] })
		rnd.Shuffle(len(again.Pools), func(i, j int) { again.Pools[i], again.Pools[j] = again.Pools[j], again.Pools[i] })
		rnd.Shuffle(len(again.Nodes), func(i, j int) { again.Nodes[i], again.Nodes[j] = again.Nodes[j], again.Nodes[i] })
		if got := ippool.Read(again); text(got) != text(f) || len(got.Refused) != len(f.Refused) {
			t.Fatalf("%s, and in another order %s", text(f), text(got))
		}
		again.Blocks = slices.DeleteFunc(again.Blocks, func(b *v1alpha1.IPBlock) bool {
			return slices.ContainsFunc(f.Refused, func(r ippool.RefusedBlock) bool { return r.Name == b.Name })
		})
		if got := text(f.WithBlocks(again.Blocks)); got != text(f) {
			t.Fatalf("%s, and without those that are refused %s", text(f), got)
		}
	}
	if usedAny < 500 || refusedAny < 500 {
		t.Errorf("%d were used and %d refused", usedAny, refusedAny)
	}
}

// TestFinalizer is there while blocks are left, whatever becomes of the pool.
func TestFinalizer(t *testing.T) {
	nodes := []*corev1.Node{node("a", "10.201.1.2", "10.244.1.0/24")}
	for _, test := range []struct {
		name          string
		has           []string
		deleted       bool
		blocks        []*v1alpha1.IPBlock
		want, differs bool
	}{
		{name: "a new pool"},
		{name: "its first block", blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}, want: true, differs: true},
		{name: "a block", has: []string{ippool.Finalizer}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}, want: true},
		{name: "no block any more", has: []string{"x.example/y", ippool.Finalizer}, differs: true},
		{name: "deleted with a block", has: []string{ippool.Finalizer}, deleted: true, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}, want: true},
		{name: "deleted without a block", has: []string{ippool.Finalizer}, deleted: true, differs: true},
		{name: "deleted before there was a finalizer", has: []string{"x.example/y"}, deleted: true, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/26")}},
		{name: "a block of another size", has: []string{ippool.Finalizer}, blocks: []*v1alpha1.IPBlock{block("p", "a", "10.50.0.0/28")}, want: true},
		{name: "a block outside of it", has: []string{ippool.Finalizer}, blocks: []*v1alpha1.IPBlock{block("p", "a", "64.0.0.0/3")}, differs: true},
		{name: "another pool's", has: []string{ippool.Finalizer}, blocks: []*v1alpha1.IPBlock{block("q", "a", "10.50.0.0/26")}, differs: true},
	} {
		p := pool("p", 1, "10.50.0.0/16")
		p.Finalizers = test.has
		if test.deleted {
			now := metav1.NewTime(epoch)
			p.DeletionTimestamp = &now
		}
		f := ippool.Read(ippool.Objects{Pools: []*v1alpha1.IPPool{p}, Blocks: test.blocks, Nodes: nodes})
		want, differs := f.Finalizers(f.Pools[0])
		if slices.Contains(want, ippool.Finalizer) != test.want || differs != test.differs || slices.Contains(test.has, "x.example/y") != slices.Contains(want, "x.example/y") {
			t.Errorf("%s: %v, differs %v", test.name, want, differs)
		}
	}
}
