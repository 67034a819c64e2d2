package ruleset_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// key reads "10.96.0.1:80/TCP".
func key(s string) service.Key {
	addr, protocol, _ := strings.Cut(s, "/")
	to := netip.MustParseAddrPort(addr)
	return service.Key{Addr: to.Addr(), Port: to.Port(), Protocol: map[string]service.Protocol{
		"TCP": service.TCP, "UDP": service.UDP, "SCTP": service.SCTP}[protocol]}
}

// to returns backends at addresses and ports.
func to(list ...string) service.Backends {
	var b service.Backends
	for _, s := range list {
		b.Endpoints = append(b.Endpoints, netip.MustParseAddrPort(s))
	}
	return b
}

// frontend returns a frontend that is the same for all clients.
func frontend(name, at string, kind service.Kind, b service.Backends) service.Frontend {
	return service.Frontend{Key: key(at), Service: service.Name{Namespace: "default", Name: name}, Kind: kind, Inside: b, Outside: b}
}

func with(f service.Frontend, change func(*service.Frontend)) service.Frontend {
	change(&f)
	return f
}

func plan(frontends ...service.Frontend) service.Plan {
	p := service.Plan{Frontends: frontends,
		NodePortAddrs: []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8::10")},
		OwnPods:       prefixes("10.244.1.0/24", "fd00:10:244:1::/64")}
	slices.SortFunc(p.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	return p
}

// everything returns a plan with one Service for each feature of the table.
func everything() service.Plan {
	var all []service.Frontend
	for _, f := range []struct{ vip, lb, any, own, far, source string }{
		{"10.96.0.%d", "198.51.100.%d", "0.0.0.0", "10.244.1.%d", "10.244.0.%d", "203.0.113.0/24"},
		{"[fd00:10:96::%d]", "[2001:db8:1::%d]", "[::]", "[fd00:10:244:1::%d]", "[fd00:10:244::%d]", "2001:db8:2::/48"},
	} {
		at := func(format string, n int, rest string) string { return fmt.Sprintf(format, n) + rest }
		web := to(at(f.far, 2, ":8080"), at(f.own, 2, ":8080"), at(f.own, 3, ":8080"))
		own := to(at(f.own, 2, ":8080"), at(f.own, 3, ":8080"))
		all = append(all,
			with(frontend("web", at(f.vip, 1, ":80/TCP"), service.ClusterIP, web), func(x *service.Frontend) { x.PortName = "http" }),
			with(frontend("web", f.any+":30080/TCP", service.NodePort, web), func(x *service.Frontend) { x.PortName = "http" }),
			frontend("dns", at(f.vip, 10, ":53/UDP"), service.ClusterIP, to(at(f.own, 4, ":53"))),
			frontend("sctp", at(f.vip, 11, ":9/SCTP"), service.ClusterIP, to(at(f.own, 4, ":9"), at(f.far, 4, ":9"))),
			frontend("empty", at(f.vip, 12, ":80/TCP"), service.ClusterIP, service.Backends{}),
			frontend("elsewhere", at(f.vip, 13, ":80/TCP"), service.ClusterIP, service.Backends{Drop: true}),
			with(frontend("local", at(f.lb, 1, ":80/TCP"), service.LoadBalancer, web), func(x *service.Frontend) { x.Outside = own }),
			with(frontend("local", f.any+":30081/TCP", service.NodePort, web), func(x *service.Frontend) { x.Outside = own }),
			with(frontend("local-elsewhere", at(f.lb, 2, ":80/TCP"), service.LoadBalancer, to(at(f.far, 2, ":8080"))), func(x *service.Frontend) {
				x.Outside = service.Backends{Drop: true}
			}),
			with(frontend("some", at(f.lb, 3, ":80/TCP"), service.LoadBalancer, web), func(x *service.Frontend) { x.Sources = prefixes(f.source) }),
			with(frontend("external", at(f.lb, 6, ":80/TCP"), service.ExternalIP, web), func(x *service.Frontend) { x.PodsOnly = true }),
			with(frontend("none", at(f.lb, 4, ":80/TCP"), service.LoadBalancer, web), func(x *service.Frontend) { x.Sources = []netip.Prefix{} }),
			with(frontend("sticky", at(f.vip, 14, ":80/TCP"), service.ClusterIP, web), func(x *service.Frontend) { x.Affinity = 3 * time.Hour }),
			with(frontend("sticky", at(f.lb, 5, ":80/TCP"), service.LoadBalancer, web), func(x *service.Frontend) {
				x.Affinity, x.Outside = 3*time.Hour, own
			}),
		)
	}
	return plan(all...)
}

// set sets a plan, checks that the kernel holds it, and that setting it again changes nothing.
func set(t testing.TB, r *ruleset.Ruleset, p service.Plan) diff.Count {
	t.Helper()
	count, err := r.SetServices(p)
	testenv.Must(t, err)
	holds(t, r, p)
	return count
}

// holds checks what the kernel holds, as a new Ruleset reads it.
func holds(t testing.TB, r *ruleset.Ruleset, p service.Plan) {
	t.Helper()
	if again, err := r.SetServices(p); err != nil || again != (diff.Count{}) {
		t.Errorf("the second time changes %+v, %v", again, err)
	}
	want, err := service.ByPacketOf(p)
	testenv.Must(t, err)
	have, err := r.Services()
	testenv.Must(t, err)
	samePlan(t, have, want)
}

func samePlan(t testing.TB, have, want service.Plan) {
	t.Helper()
	if !slices.EqualFunc(have.Frontends, want.Frontends, service.Frontend.Equal) {
		t.Errorf("holds frontends\n%+v\nwant\n%+v", have.Frontends, want.Frontends)
	}
	if !slices.Equal(have.NodePortAddrs, want.NodePortAddrs) || !slices.Equal(have.OwnPods, want.OwnPods) {
		t.Errorf("holds\n%v %v\nwant\n%v %v", have.NodePortAddrs, have.OwnPods, want.NodePortAddrs, want.OwnPods)
	}
}

func TestServices(t *testing.T) {
	n, r := space(t)
	other := another(t, n)
	p := everything()
	if got := set(t, r, p); got != (diff.Count{Added: 1}) {
		t.Errorf("the first time changes %+v", got)
	}
	have, err := other.Services()
	testenv.Must(t, err)
	want, err := service.ByPacketOf(p)
	testenv.Must(t, err)
	samePlan(t, have, want)
	isGolden(t, n, ruleset.ServicesTable, "testdata/services.nft")
}

// another returns a new Ruleset of the same namespace.
func another(t testing.TB, n *link.Namespace) *ruleset.Ruleset {
	t.Helper()
	var r *ruleset.Ruleset
	testenv.Must(t, n.Do(func() (err error) {
		r, err = ruleset.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(r.Close)
	return r
}

func TestServicesDrift(t *testing.T) {
	n, r := space(t)
	nft(t, n, "add", "table", "inet", "other", "{ chain c { type nat hook postrouting priority 100; } ; }")
	foreign := nft(t, n, "list", "table", "inet", "other")
	p := everything()
	set(t, r, p)
	want := nft(t, n, "list", "table", "inet", ruleset.ServicesTable)
	for _, drift := range []string{
		"add element inet T services4 { 192.0.2.1 . tcp . 80 : 1 }",
		"delete element inet T services4 { 10.96.0.1 . tcp . 80 }",
		"delete element inet T endpoints6 { fd00:10:96::1 . tcp . 80 . 1 }",
		"add element inet T own_pods4 { 10.245.0.0/24 }",
		"add element inet T own_pods4 { 172.16.0.3-172.16.0.9 }",
		"delete element inet T own_endpoints4 { 10.244.1.2 . 10.244.1.2 }",
		"flush set inet T nodeport_addrs6",
		"flush map inet T sticky4",
		"flush set inet T sources4",
		"flush set inet T pods_only4",
		"flush map inet T address4_chains",
		"flush chain inet T postrouting",
		"flush chain inet T address4_n3",
		"add rule inet T output accept",
		"add chain inet T more",
		"add set inet T more { type ipv4_addr; }",
		"delete table inet T",
	} {
		t.Run(drift, func(t *testing.T) {
			nft(t, n, strings.Fields(strings.ReplaceAll(drift, " T", " "+ruleset.ServicesTable))...)
			if same, err := r.HoldsServices(t.Context()); same || err != nil {
				t.Errorf("a comparison finds nothing: %v", err)
			}
			if have, err := r.Services(); err != nil || len(have.Frontends) == len(p.Frontends) && strings.Contains(drift, "chain") {
				t.Errorf("passes for what it should be: %v", err)
			}
			set(t, r, p)
			if got := nft(t, n, "list", "table", "inet", ruleset.ServicesTable); got != want {
				t.Errorf("got:\n%s", got)
			}
		})
	}

	// The affinity of clients does not count as drift, even if another process changes the rest of the rule set.
	nft(t, n, "add", "element", "inet", ruleset.ServicesTable, "affinity4", "{ 203.0.113.1 . 7 : 9 }")
	for range 2 {
		if same, err := r.HoldsServices(t.Context()); !same || err != nil {
			t.Errorf("a comparison finds a difference, %v", err)
		}
	}
	if got := set(t, r, p); got != (diff.Count{}) {
		t.Errorf("affinity counts as %+v", got)
	}
	for range 2 {
		testenv.Must(t, r.DeleteServices())
	}
	if got := nft(t, n, "list", "ruleset"); got != foreign {
		t.Errorf("left behind:\n%s", got)
	}
	if have, err := r.Services(); err != nil || len(have.Frontends) != 0 {
		t.Errorf("without a table: %v, %v", have, err)
	}
	if err := r.ChangeServices(nil); err == nil {
		t.Error("a table that was not set is changed")
	}
	if same, err := r.HoldsServices(t.Context()); same || err != nil {
		t.Errorf("a table that was not set is as it should be, %v", err)
	}
}

func TestServicesThatAreNot(t *testing.T) {
	_, r := space(t)
	one := frontend("one", "10.96.0.1:80/TCP", service.ClusterIP, to("10.244.1.2:8080"))
	for what, p := range map[string]service.Plan{
		"10.96.0.1:80/TCP is both of Service default/one and of default/two": plan(one, frontend("two", "10.96.0.1:80/TCP", service.ClusterIP, to("10.244.1.3:8080"))),
		"the endpoint [fd00::1]:80 is of another family":                     plan(frontend("one", "10.96.0.1:80/TCP", service.ClusterIP, to("[fd00::1]:80"))),
		"0.0.0.0:30080/TCP of Service default/one: a NodePort cannot be for certain sources": plan(with(frontend("one", "0.0.0.0:30080/TCP", service.NodePort, to("10.244.1.2:8080")), func(f *service.Frontend) {
			f.Sources = prefixes("203.0.113.0/24")
		})),
	} {
		if _, err := r.SetServices(p); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("error %v, want one that says %q", err, what)
		}
	}
	// A change whose old state is not the kernel's is rejected. Setting the whole plan repairs it.
	set(t, r, plan(one))
	changed := with(one, func(f *service.Frontend) { f.Inside, f.Outside = to("10.244.1.3:8080"), to("10.244.1.3:8080") })
	if err := r.ChangeServices([]service.Change{{Service: one.Service, Old: []service.Frontend{changed}}}); err == nil {
		t.Error("what is not there is taken away")
	}
	set(t, r, plan(changed))
}

// random returns a Service with frontends of all kinds and keys of its own.
func random(rng *rand.Rand, i int) []service.Frontend {
	name := fmt.Sprintf("s%d", i)
	affinity := []time.Duration{0, 0, time.Hour, 10 * time.Second}[rng.IntN(4)]
	local, drop := rng.IntN(2) == 0, rng.IntN(2) == 0
	var list []service.Frontend
	for _, f := range []struct{ vip, lb, any, pod, source string }{
		{fmt.Sprintf("10.96.0.%d", i+1), fmt.Sprintf("198.51.100.%d", i+1), "0.0.0.0", "10.244.%d.%d", "10.%d.0.0/16"},
		{fmt.Sprintf("[fd00:96::%d]", i+1), fmt.Sprintf("[2001:db8::%d]", i+1), "[::]", "[fd00:10:244:%d::%d]", "2001:db8:%d::/48"},
	} {
		if rng.IntN(5) == 0 {
			continue
		}
		var all, own service.Backends
		for n := range rng.IntN(6) {
			node := rng.IntN(2)
			e := to(fmt.Sprintf(f.pod, node, n+2) + ":80").Endpoints
			all.Endpoints = append(all.Endpoints, e...)
			if node == 1 {
				own.Endpoints = append(own.Endpoints, e...)
			}
		}
		own.Drop = drop
		port := []string{":80/TCP", ":53/UDP", ":9/SCTP"}[rng.IntN(3)]
		add := func(at string, kind service.Kind) *service.Frontend {
			list = append(list, with(frontend(name, at, kind, all), func(x *service.Frontend) { x.Affinity = affinity }))
			x := &list[len(list)-1]
			if local && kind != service.ClusterIP {
				x.Outside = own
			}
			return x
		}
		add(f.vip+port, service.ClusterIP)
		if rng.IntN(2) == 0 {
			add(fmt.Sprintf("%s:%d/TCP", f.any, 30000+i), service.NodePort)
		}
		if rng.IntN(2) == 0 {
			x := add(f.lb+port, service.LoadBalancer)
			for range rng.IntN(4) {
				x.Sources = append(x.Sources, netip.MustParsePrefix(fmt.Sprintf(f.source, rng.IntN(4))))
			}
		}
	}
	return list
}

// The kernel holds the same after changes as after setting everything at once.
func TestServicesAtRandom(t *testing.T) {
	n, r := space(t)
	other := another(t, n)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const count, steps = 20, 200
	now := make([][]service.Frontend, count)
	all := func() service.Plan { return plan(slices.Concat(now...)...) }
	set(t, r, all())
	for step := range steps {
		var changes []service.Change
		for _, i := range rng.Perm(count)[:1+rng.IntN(3)] {
			c := service.Change{Service: service.Name{Namespace: "default", Name: fmt.Sprintf("s%d", i)}, Old: now[i], New: random(rng, i)}
			if rng.IntN(6) == 0 {
				c.New = nil
			}
			now[i] = c.New
			changes = append(changes, c)
		}
		p := all()
		if rng.IntN(8) == 0 {
			if rng.IntN(2) == 0 {
				p.OwnPods = prefixes("10.244.0.0/24", "fd00:10:244::/64")
				set(t, r, p)
				p = all()
			}
			if rng.IntN(2) == 0 {
				_, err := other.SetServices(p) // another process, of which r does not know
				testenv.Must(t, err)
			}
			set(t, r, p)
		} else {
			testenv.Must(t, r.ChangeServices(changes))
		}
		if step%5 == 0 {
			want, err := service.ByPacketOf(p)
			testenv.Must(t, err)
			have, err := other.Services()
			testenv.Must(t, err)
			samePlan(t, have, want)
			holds(t, r, p)
		}
		if t.Failed() {
			t.FailNow()
		}
	}
}

func BenchmarkServices(b *testing.B) {
	n, r := space(b)
	var all []service.Frontend
	for i := range 10000 {
		var e service.Backends
		for j := range 10 {
			e.Endpoints = append(e.Endpoints, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200 + byte(j), byte(i >> 8), byte(i)}), 8080))
		}
		all = append(all, frontend(fmt.Sprintf("s%d", i), fmt.Sprintf("10.96.%d.%d:80/TCP", i/250, i%250+1), service.ClusterIP, e))
	}
	all[1].Inside.Endpoints = all[1].Inside.Endpoints[:9] // so that there is a chain for nine
	all[1].Outside = all[1].Inside
	full := plan(all...)
	fewer := with(all[5000], func(f *service.Frontend) {
		f.Inside.Endpoints = f.Inside.Endpoints[:9]
		f.Outside = f.Inside
	})
	other := with(all[5000], func(f *service.Frontend) {
		f.Inside.Endpoints = slices.Clone(f.Inside.Endpoints)
		f.Inside.Endpoints[9] = netip.MustParseAddrPort("10.210.0.1:8080")
		f.Outside = f.Inside
	})
	change := func(old, now service.Frontend) {
		testenv.Must(b, r.ChangeServices([]service.Change{{Service: old.Service, Old: []service.Frontend{old}, New: []service.Frontend{now}}}))
	}
	b.Run("all of 10000 x 10", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			testenv.Must(b, r.DeleteServices())
			b.StartTimer()
			_, err := r.SetServices(full)
			testenv.Must(b, err)
		}
	})
	b.Run("an endpoint becomes another", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			two := [2]service.Frontend{all[5000], other}
			change(two[i%2], two[(i+1)%2])
		}
		_, err := r.SetServices(full)
		testenv.Must(b, err)
	})
	b.Run("an endpoint comes or goes", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			two := [2]service.Frontend{all[5000], fewer}
			change(two[i%2], two[(i+1)%2])
		}
		_, err := r.SetServices(full)
		testenv.Must(b, err)
	})
	b.Run("nothing", func(b *testing.B) {
		for b.Loop() {
			_, err := r.SetServices(full)
			testenv.Must(b, err)
		}
	})
	b.Run("nothing, read", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			b.StopTimer()
			nft(b, n, []string{"add", "delete"}[i%2], "table", "inet", "other")
			b.StartTimer()
			_, err := r.SetServices(full)
			testenv.Must(b, err)
		}
	})
	b.Run("compared", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			b.StopTimer()
			nft(b, n, []string{"add", "delete"}[i%2], "table", "inet", "another")
			b.StartTimer()
			if same, err := r.HoldsServices(b.Context()); !same || err != nil {
				b.Fatal(same, err)
			}
		}
	})
}

// Changes of NodePortAddrs and OwnPods change elements, and never replace the table.
func TestServicesInPlace(t *testing.T) {
	n, r := space(t)
	p := everything()
	set(t, r, p)
	const remembered = "203.0.113.1 . 0x00000007"
	nft(t, n, "add", "element", "inet", ruleset.ServicesTable, "affinity4", "{ 203.0.113.1 . 7 : 9 }")
	for _, change := range []func(*service.Plan){
		func(p *service.Plan) {
			p.OwnPods = append(p.OwnPods, prefixes("10.244.2.0/24", "fd00:10:244:2::/64")...)
		},
		func(p *service.Plan) { p.OwnPods = prefixes("10.244.0.0/16", "10.244.3.0/24", "fd00:10:244::/56") },
		func(p *service.Plan) { p.OwnPods = prefixes("0.0.0.0/0", "::/0") },
		func(p *service.Plan) { p.OwnPods = nil },
		func(p *service.Plan) { p.OwnPods = prefixes("10.244.0.0/16") },
		func(p *service.Plan) { p.OwnPods = prefixes("10.244.1.0/25", "10.244.1.128/25", "fd00::/8") },
		func(p *service.Plan) { p.NodePortAddrs = nil },
		func(p *service.Plan) { p.NodePortAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.11")} },
		func(p *service.Plan) { p.Frontends = p.Frontends[:10] },
		func(p *service.Plan) { p.Frontends = append(p.Frontends, everything().Frontends[12:]...) },
		func(p *service.Plan) {
			for i := range p.Frontends {
				if f := &p.Frontends[i]; f.Sources != nil && f.Addr.Is4() {
					f.Sources = prefixes("10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8", "192.0.2.7/32", "255.255.255.255/32")
				} else if f.Sources != nil {
					f.Sources = prefixes("2001:db8::/32", "2001:db8:1::/48", "::/128")
				}
			}
		},
		func(p *service.Plan) {
			for i := range p.Frontends {
				if f := &p.Frontends[i]; f.Sources != nil && f.Addr.Is4() {
					f.Sources = prefixes("0.0.0.0/0")
				} else if f.Sources != nil {
					f.Sources = prefixes("::/0")
				}
			}
		},
		func(p *service.Plan) { *p = service.Plan{} },
		func(p *service.Plan) { *p = everything() },
	} {
		p.Frontends = slices.Clone(p.Frontends)
		change(&p)
		got, err := r.SetServices(p)
		testenv.Must(t, err)
		if got == (diff.Count{}) {
			t.Error("nothing changed")
		}
		holds(t, r, p)
		want, err := service.ByPacketOf(p)
		testenv.Must(t, err)
		have, err := another(t, n).Services()
		testenv.Must(t, err)
		samePlan(t, have, want)
		if list := nft(t, n, "list", "map", "inet", ruleset.ServicesTable, "affinity4"); !strings.Contains(list, remembered) {
			t.Fatalf("the table was made anew:\n%s", list)
		}
	}
}
