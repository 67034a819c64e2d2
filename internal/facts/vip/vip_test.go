package vip_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func pool(name string, age int, addresses string, change ...func(*v1alpha1.AddressPoolSpec)) *v1alpha1.AddressPool {
	p := &v1alpha1.AddressPool{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(epoch.Add(-time.Duration(age) * time.Minute))}}
	p.Spec.Addresses = strings.Fields(addresses)
	for _, c := range change {
		c(&p.Spec)
	}
	return p
}

func onDemand(s *v1alpha1.AddressPoolSpec) { s.AutoAssign = new(bool) }

func forNamespace(label string) func(*v1alpha1.AddressPoolSpec) {
	return func(s *v1alpha1.AddressPoolSpec) {
		s.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": label}}
	}
}

func forService(label string) func(*v1alpha1.AddressPoolSpec) {
	return func(s *v1alpha1.AddressPoolSpec) {
		s.ServiceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"tier": label}}
	}
}

// serviceOf reads "NAME word ...": a word is KEY=VALUE.
func serviceOf(t *testing.T, text string, age int) *corev1.Service {
	t.Helper()
	words := strings.Fields(text)
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: words[0], Namespace: "shop", CreationTimestamp: metav1.NewTime(epoch.Add(-time.Duration(age) * time.Minute)),
		Annotations: map[string]string{}, Labels: map[string]string{}}}
	s.Spec.Type, s.Spec.IPFamilies = corev1.ServiceTypeLoadBalancer, []corev1.IPFamily{corev1.IPv4Protocol}
	s.Spec.Ports = []corev1.ServicePort{{Port: 80}}
	for _, w := range words[1:] {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "ns":
			s.Namespace = value
		case "has":
			for a := range strings.SplitSeq(value, ",") {
				s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
			}
		case "asks":
			s.Annotations[vip.AddressAnnotation] = value
		case "ip":
			s.Spec.LoadBalancerIP = value
		case "pool":
			s.Annotations[vip.PoolAnnotation] = value
		case "share":
			s.Annotations[vip.ShareAnnotation] = value
		case "tier":
			s.Labels["tier"] = value
		case "class":
			s.Spec.LoadBalancerClass = &value
		case "local":
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		case "app":
			s.Spec.Selector = map[string]string{"app": value}
		case "unready":
			s.Spec.PublishNotReadyAddresses = true
		case "port":
			s.Spec.Ports = nil
			for p := range strings.SplitSeq(value, ",") {
				number, protocol, _ := strings.Cut(p, "/")
				n, err := strconv.Atoi(number)
				if err != nil {
					t.Fatal(err)
				}
				s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Port: int32(n), Protocol: corev1.Protocol(protocol)})
			}
		case "families":
			s.Spec.IPFamilies = nil
			for f := range strings.SplitSeq(value, ",") {
				s.Spec.IPFamilies = append(s.Spec.IPFamilies, corev1.IPFamily(f))
			}
		case "policy":
			s.Spec.IPFamilyPolicy = (*corev1.IPFamilyPolicy)(&value)
		default:
			t.Fatalf("service: %q", w)
		}
	}
	return s
}

var namespaces = map[string]labels.Set{"shop": {"team": "shop"}, "blog": {"team": "blog"}}

func TestAssign(t *testing.T) {
	const dual = " families=IPv4,IPv6 policy=PreferDualStack"
	for _, tc := range []struct {
		name     string
		pools    []*v1alpha1.AddressPool
		services []string // the oldest first
		want     []string // NAME ADDRESSES or NAME REASON: TEXT that is begun with
	}{
		{"no pool", nil, []string{"a"}, []string{"a NoAddressPool: there is no AddressPool"}},
		{"no pool, and an address asked for", nil, []string{"a asks=192.0.2.1"}, []string{"a NoAddressPool: there is no AddressPool"}},
		{"the oldest first, in order", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"b", "a"}, []string{"b 192.0.2.8", "a 192.0.2.9"}},
		{"others' class", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a class=cloud", "b class=fathom.network/pool"}, []string{"b 192.0.2.8"}},
		{"keeps what it has", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a", "b has=192.0.2.8"}, []string{"a 192.0.2.9", "b 192.0.2.8"}},
		{"both say they have it", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a has=192.0.2.8", "b has=192.0.2.8"}, []string{"a 192.0.2.8", "b 192.0.2.9"}},
		{"what it has is of no pool", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a has=198.51.100.1"}, []string{"a 192.0.2.8"}},
		{"a request before what is free", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a", "b asks=192.0.2.8"}, []string{"a 192.0.2.9", "b 192.0.2.8"}},
		{"the old field", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a ip=192.0.2.12"}, []string{"a 192.0.2.12"}},
		{"a request is another's", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a has=192.0.2.8", "b asks=192.0.2.8"},
			[]string{"a 192.0.2.8", "b AddressInUse: 192.0.2.8: Service shop/a has it"}},
		{"a request changes", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a has=192.0.2.8 asks=192.0.2.10"}, []string{"a 192.0.2.10"}},
		{"a request of no pool", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a asks=192.0.2.1"}, []string{"a InvalidAddressRequest: 192.0.2.1 is of no AddressPool"}},
		{"nonsense", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a asks=any", "b asks=192.0.2.8,192.0.2.9", "c asks=fd00::1", "d asks=x has=192.0.2.9"},
			[]string{"a InvalidAddressRequest: annotation", "b InvalidAddressRequest: annotation", "c InvalidAddressRequest: annotation", "d 192.0.2.9 InvalidAddressRequest: annotation"}},
		{"not by itself", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29", onDemand)}, []string{"a", "b pool=p", "c asks=192.0.2.14"},
			[]string{"a NoAddressPool: no AddressPool is for this Service: AddressPool p is for Services that name it", "b 192.0.2.8", "c 192.0.2.14"}},
		{"a pool by name", []*v1alpha1.AddressPool{pool("p", 2, "192.0.2.8/29"), pool("q", 1, "198.51.100.8/29")}, []string{"a pool=q", "b pool=r", "c pool=q has=192.0.2.8"},
			[]string{"a 198.51.100.8", "b InvalidAddressRequest: there is no AddressPool r", "c 198.51.100.9"}},
		{"pools of a namespace and of Services", []*v1alpha1.AddressPool{pool("all", 5, "192.0.2.8/29"), pool("blog", 2, "198.51.100.8/29", forNamespace("blog")), pool("gold", 1, "203.0.113.8/29", forService("gold"))},
			[]string{"a", "b ns=blog", "c tier=gold", "d pool=blog", "e ns=other"},
			[]string{"a 192.0.2.8", "b 198.51.100.8", "c 203.0.113.8", "d NoAddressPool: no AddressPool is for this Service: AddressPool blog is not for namespace shop", "e 192.0.2.9"}},
		{"full", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8-192.0.2.9")}, []string{"a", "b", "c"}, []string{"a 192.0.2.8", "b 192.0.2.9", "c AddressPoolExhausted: no IPv4 address is free in AddressPool p"}},
		{"zeros before numbers", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a ip=192.000.002.010", "b asks=192.0.2.011", "c ip=fe80::1%eth0", "d ip=192.0.2"},
			[]string{"a 192.0.2.10", "b 192.0.2.11", "c InvalidAddressRequest: spec.loadBalancerIP: \"fe80::1%eth0\" is no address", "d InvalidAddressRequest: spec.loadBalancerIP: \"192.0.2\" is no address"}},
		{"the next pool", []*v1alpha1.AddressPool{pool("p", 2, "192.0.2.8/32"), pool("q", 1, "192.0.2.20/32")}, []string{"a", "b"}, []string{"a 192.0.2.8", "b 192.0.2.20"}},
		{"both families", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29 fd00:80::/120")}, []string{"a" + dual, "b asks=fd00:80::f,192.0.2.14" + dual, "c asks=fd00:80::20" + dual},
			[]string{"a 192.0.2.8,fd00:80::1", "b 192.0.2.14,fd00:80::f", "c 192.0.2.9,fd00:80::20"}},
		{"both of one pool", []*v1alpha1.AddressPool{pool("four", 3, "192.0.2.8/29"), pool("both", 2, "198.51.100.8/29 fd00:80::/120")}, []string{"a" + dual}, []string{"a 198.51.100.8,fd00:80::1"}},
		{"one of two is enough", []*v1alpha1.AddressPool{pool("four", 3, "192.0.2.8/29")}, []string{"a" + dual}, []string{"a 192.0.2.8"}},
		{"the second of two is enough", []*v1alpha1.AddressPool{pool("six", 3, "fd00:80::/120")}, []string{"a" + dual}, []string{"a fd00:80::1"}},
		{"one of two is not enough", []*v1alpha1.AddressPool{pool("four", 3, "192.0.2.8/29")}, []string{"a families=IPv4,IPv6 policy=RequireDualStack", "b"},
			[]string{"a NoAddressPool: no AddressPool that this Service may use has IPv6 addresses", "b 192.0.2.8"}},
		{"no family of it", []*v1alpha1.AddressPool{pool("four", 3, "192.0.2.8/29")}, []string{"a families=IPv6"}, []string{"a NoAddressPool: no AddressPool that this Service may use has IPv6"}},
		{"sharing", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")},
			[]string{"a share=k", "b share=k port=443", "c share=k port=53/UDP,53/TCP", "d share=k port=443", "e share=other port=22", "f share=k ns=blog port=22", "g share=k port=25 local"},
			[]string{"a 192.0.2.8", "b 192.0.2.8", "c 192.0.2.8", "d 192.0.2.9", "e 192.0.2.10", "f 192.0.2.11", "g 192.0.2.12"}},
		{"sharing is not possible, and nothing else is free", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/32")},
			[]string{"a share=k", "b share=k port=443 local", "c share=k", "d share=other", "e share=k port=443"},
			[]string{"a 192.0.2.8",
				"b AddressInUse: it cannot share 192.0.2.8: Service shop/a has it, and another externalTrafficPolicy: those who share an address have the same; and no other IPv4 address is free in AddressPool p",
				"c AddressInUse: it cannot share 192.0.2.8: Service shop/a has it, and port 80/TCP, too: those who share an address have different ports; and no other",
				"d AddressPoolExhausted: no IPv4 address is free in AddressPool p", "e 192.0.2.8"}},
		{"with a policy of Local, sharing is for the same pods", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")},
			[]string{"a share=k local app=web", "b share=k port=443 local app=web", "c share=k port=25 local app=mail", "d share=k port=26 local app=web unready",
				"e share=l port=1 local", "f share=l port=2 local"},
			[]string{"a 192.0.2.8", "b 192.0.2.8", "c 192.0.2.9", "d 192.0.2.10", "e 192.0.2.11", "f 192.0.2.12"}},
		{"which is said", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/32")}, []string{"a share=k local app=web", "b share=k port=25 local app=mail"},
			[]string{"a 192.0.2.8", "b AddressInUse: it cannot share 192.0.2.8: Service shop/a has it, and other pods (spec.selector)"}},
		{"and ends with another selector", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a share=k local app=web has=192.0.2.8", "b share=k port=25 local app=mail has=192.0.2.8"},
			[]string{"a 192.0.2.8", "b 192.0.2.9"}},
		{"sharing by request", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")},
			[]string{"a share=k asks=192.0.2.10", "b share=k port=443 asks=192.0.2.10", "c share=k asks=192.0.2.10", "d asks=192.0.2.10 port=9"},
			[]string{"a 192.0.2.10", "b 192.0.2.10", "c AddressInUse: 192.0.2.10: Service shop/a has it, and port 80/TCP, too", "d AddressInUse: 192.0.2.10: Service shop/a has it: ask for another"}},
		{"sharing ends with the key", []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29")}, []string{"a share=k has=192.0.2.8", "b port=443 has=192.0.2.8"}, []string{"a 192.0.2.8", "b 192.0.2.9"}},
		{"ends of networks", []*v1alpha1.AddressPool{pool("p", 2, "192.0.2.254-192.0.3.1")}, []string{"a", "b", "c", "d asks=192.0.2.255"},
			[]string{"a 192.0.2.254", "b 192.0.3.1", "c AddressPoolExhausted: no", "d 192.0.2.255"}},
		{"a pool with a problem gives no more", []*v1alpha1.AddressPool{pool("p", 2, "192.0.2.8/29"), pool("q", 1, "192.0.2.8/28")}, []string{"a has=192.0.2.3", "b pool=q"},
			[]string{"a 192.0.2.3", "b NoAddressPool: no AddressPool is for this Service: AddressPool q cannot be used: spec.addresses: "}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var list []*corev1.Service
			for i, s := range tc.services {
				list = append(list, serviceOf(t, s, len(tc.services)-i))
			}
			if tc.name == "a pool with a problem gives no more" {
				tc.pools[1].Spec.Addresses = []string{"192.0.2.0/28"}
			}
			var got []string
			for _, a := range vip.Read(vip.Objects{Pools: tc.pools}).Assign(list, namespaces) {
				got = append(got, render(a))
			}
			same := len(got) == len(tc.want)
			for i := range tc.want {
				same = same && (got[i] == tc.want[i] || strings.Contains(tc.want[i], ": ") && strings.HasPrefix(got[i], tc.want[i]) || strings.HasSuffix(tc.want[i], "annotation") && strings.HasPrefix(got[i], tc.want[i]))
			}
			if !same {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
		})
	}
}

func render(a vip.Assignment) string {
	words := []string{a.Service.Name}
	var addrs []string
	for _, x := range a.Addresses {
		addrs = append(addrs, x.String())
	}
	if len(addrs) > 0 {
		words = append(words, strings.Join(addrs, ","))
	}
	if a.Reason != "" {
		words = append(words, a.Reason+": "+a.Text)
	}
	return strings.Join(words, " ")
}

func TestRead(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}}
	node.Spec.PodCIDRs = []string{"10.244.1.0/24", "fd00:244:1::/64"}
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	services := &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}}
	services.Spec.CIDRs = []string{"10.96.0.0/16"}
	pods := &v1alpha1.IPPool{ObjectMeta: metav1.ObjectMeta{Name: "extra"}}
	pods.Spec.IPv4 = &v1alpha1.IPPoolRange{CIDR: "10.50.0.0/16"}
	for addresses, want := range map[string]string{
		"192.0.2.8/29 fd00:80::/64":         "",
		"192.0.2.8-192.0.2.9":               "",
		"192.0.2.8":                         "InvalidField is neither a CIDR",
		"192.0.2.9/29":                      "InvalidField has bits behind the prefix: want 192.0.2.8/29",
		"192.0.2.9-192.0.2.8":               "InvalidField ends before it begins",
		"192.0.2.9-fd00::1":                 "InvalidField begins in one family",
		"192.0.2.9-x":                       "InvalidField is no range",
		"::ffff:192.0.2.0/120":              "InvalidField is neither a CIDR",
		"224.0.0.0/24":                      "InvalidField which no Service can have",
		"fe80::/64":                         "InvalidField which no Service can have",
		"":                                  "InvalidField without addresses",
		"192.0.2.8/29 192.0.2.12/30":        "Overlap of the same pool",
		"203.0.113.255-203.0.114.9":         "Overlap of AddressPool old, which is older",
		"192.0.2.0/29":                      "NodeAddressClash which is node n1's own address",
		"10.244.0.0/16":                     "PodOverlap which is pods' of node n1",
		"10.50.3.0/24":                      "PodOverlap which is pods' (IPPool extra)",
		"10.96.3.0/24":                      "ServiceOverlap which is Services' (ServiceCIDR kubernetes)",
		"198.51.100.1-198.51.100.1 x":       "InvalidField neither",
		"fd00:244:1::-fd00:244:1::ff":       "PodOverlap",
		"192.0.2.8/29 fd00:244:0:ffff::/64": "",
	} {
		pools := vip.Read(vip.Objects{Pools: []*v1alpha1.AddressPool{pool("p", 1, addresses), pool("old", 2, "203.0.113.0/24")}, Nodes: []*corev1.Node{node},
			Services: []*networkingv1.ServiceCIDR{services}, PodPools: []*v1alpha1.IPPool{pods}})
		if pools[0].Name != "old" || pools[0].Problem != nil {
			t.Fatalf("%q: the older pool is %+v", addresses, pools[0])
		}
		got := ""
		if p := pools[1].Problem; p != nil {
			got = p.Reason + " " + p.String()
		}
		reason, text, _ := strings.Cut(want, " ")
		if (got == "") != (want == "") || !strings.HasPrefix(got, reason) || !strings.Contains(got, text) {
			t.Errorf("%q gives %q, want %q", addresses, got, want)
		}
	}
}

func TestStatus(t *testing.T) {
	pools := vip.Read(vip.Objects{Pools: []*v1alpha1.AddressPool{pool("p", 0, "192.0.2.8/29 192.0.2.20-192.0.2.21 fd00::/32")}})
	list := pools.Assign([]*corev1.Service{serviceOf(t, "a share=k", 2), serviceOf(t, "b share=k port=8", 1)}, namespaces)
	status, differs := pools[0].Status(list, epoch)
	if !differs || status.Services != 2 || status.IPv4.Addresses != 10 || status.IPv4.Assigned != 1 || status.IPv6.Addresses != 1<<63-1 || status.IPv6.Assigned != 0 {
		t.Errorf("%v %+v %+v %+v", differs, status, status.IPv4, status.IPv6)
	}
	pools[0].Object().Status = status
	if _, differs := pools[0].Status(list, epoch.Add(time.Hour)); differs {
		t.Error("the status differs from itself")
	}
}

// TestAssignProperties changes Services and pools at random: no address is anybody's twice who may not share it, an
// address is of a pool, and who is not concerned by a change keeps what it has.
func TestAssignProperties(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 0))
	pick := func(list ...string) string { return list[rnd.IntN(len(list))] }
	for range 150 {
		pools := []*v1alpha1.AddressPool{pool("p", 3, "192.0.2.8/29 fd00:80::/126"), pool("q", 2, "198.51.100.8/29", onDemand), pool("r", 1, "203.0.113.8/30", forNamespace("blog"))}
		services := map[string]*corev1.Service{}
		for step := range 30 {
			name := fmt.Sprint("s", rnd.IntN(20))
			if rnd.IntN(3) == 0 {
				delete(services, name)
			} else {
				s := serviceOf(t, name+pick("", " share=k", " share=l", " asks=192.0.2.10", " pool=q", " ip=fd00:80::1")+pick("", " families=IPv4,IPv6 policy=PreferDualStack", " families=IPv6,IPv4 policy=RequireDualStack", " local", " local app=web", " local app=web", " local app=mail")+
					pick("", " port=80,443", " port=53/UDP", " port=22")+pick("", " ns=blog", " ns=blog"), step%7)
				if old := services[name]; old != nil {
					s.Status = old.Status
				}
				services[name] = s
			}
			list := slices.Collect(maps.Values(services))
			read := vip.Read(vip.Objects{Pools: pools})
			got := read.Assign(list, namespaces)
			users := map[netip.Addr][]*corev1.Service{}
			for _, a := range got {
				s := services[a.Service.Name]
				if len(a.Addresses) == 0 && a.Reason == "" {
					t.Fatalf("seed %d: %s has nothing, and nobody says why", seed, a.Service)
				}
				for i, addr := range a.Addresses {
					if !read.Contains(addr) || a.Pools[i] == "r" && s.Namespace != "blog" {
						t.Fatalf("seed %d: %s has %s of %s", seed, a.Service, addr, a.Pools[i])
					}
					for _, o := range users[addr] {
						if o.Namespace != s.Namespace || o.Annotations[vip.ShareAnnotation] != s.Annotations[vip.ShareAnnotation] || s.Annotations[vip.ShareAnnotation] == "" ||
							o.Spec.ExternalTrafficPolicy != s.Spec.ExternalTrafficPolicy ||
							s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && (len(s.Spec.Selector) == 0 || !maps.Equal(s.Spec.Selector, o.Spec.Selector)) {
							t.Fatalf("seed %d: %s and %s have %s", seed, s.Name, o.Name, addr)
						}
					}
					users[addr] = append(users[addr], s)
				}
				// Written, and read again.
				s.Status.LoadBalancer.Ingress = vip.Ingress(a.Addresses)
			}
			rnd.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			again := read.Assign(list, namespaces)
			for i := range got {
				if !slices.Equal(got[i].Addresses, again[i].Addresses) {
					t.Fatalf("seed %d: %s has %v, and then %v", seed, got[i].Service, got[i].Addresses, again[i].Addresses)
				}
			}
		}
	}
}

func TestEligible(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.8"), netip.MustParseAddr("192.0.2.9")
	target := func(name string, addr netip.Addr, local bool, nodes ...string) vip.Target {
		return vip.Target{Service: service.Name{Name: name}, Addrs: []netip.Addr{addr}, Local: local, Nodes: nodes}
	}
	nodes := []vip.Node{{Name: "c", Alive: true, Excluded: true}, {Name: "n2", Alive: true}, {Name: "n1", Alive: true}, {Name: "dead"}}
	for name, tc := range map[string]struct {
		targets []vip.Target
		want    []string
	}{
		"of no Service":                   {[]vip.Target{target("x", b, false, "n1")}, nil},
		"anywhere":                        {[]vip.Target{target("x", a, false)}, []string{"n1", "n2"}},
		"where it is":                     {[]vip.Target{target("x", a, true, "dead", "n2")}, []string{"n2"}},
		"only where it is not wanted":     {[]vip.Target{target("x", a, true, "c", "dead")}, []string{"c"}},
		"nowhere":                         {[]vip.Target{target("x", a, true)}, nil},
		"of several that share, with all": {[]vip.Target{target("x", a, true, "n1", "n2"), target("y", a, true, "n2"), target("z", b, true, "n1")}, []string{"n2"}},
	} {
		if got := vip.Eligible(a, tc.targets, nodes); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	if got := vip.Eligible(a, []vip.Target{target("x", a, false)}, nodes[:1]); !slices.Equal(got, []string{"c"}) {
		t.Errorf("the only node is left out: %v", got)
	}
}

// TestAnnouncer: of 5 nodes each has about a fifth of 1,000 addresses, and of one that goes nobody else's move.
func TestAnnouncer(t *testing.T) {
	nodes := []string{"east-worker1", "east-worker2", "east-worker3", "east-worker4", "east-worker5"}
	share, moved := map[string]int{}, 0
	addr := netip.MustParseAddr("192.0.2.0")
	for range 1000 {
		addr = addr.Next()
		before := vip.Announcer(addr, nodes)
		after := vip.Announcer(addr, nodes[1:])
		share[before]++
		switch {
		case before != nodes[0] && after != before:
			t.Fatalf("%s goes from %s to %s, and neither has gone", addr, before, after)
		case before != after:
			moved++
		}
	}
	for _, n := range nodes {
		if share[n] < 120 || share[n] > 280 {
			t.Errorf("%s has %d of 1000 addresses", n, share[n])
		}
	}
	if moved != share[nodes[0]] {
		t.Errorf("%d addresses move, and %d had to", moved, share[nodes[0]])
	}
	if got := vip.Announcer(addr, nil); got != "" {
		t.Errorf("nobody is %q", got)
	}
}

func FuzzParseRange(f *testing.F) {
	for _, s := range []string{"192.0.2.8/29", "fd00::/64", "192.0.2.1-192.0.2.9", "fd00::1 - fd00::9", "-", "/", "1.2.3.4-", "::-::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := vip.ParseRange(s)
		if (err == nil) != r.First.IsValid() {
			t.Fatalf("%q: both %v and %v, or none", s, r, err)
		}
		if err == nil && (!r.Contains(r.First) || !r.Contains(r.Last)) {
			t.Errorf("%q: %v does not contain its ends", s, r)
		}
	})
}
