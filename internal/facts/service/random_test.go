package service_test

import (
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
)

// world is the API's objects, a model of them, and the frontends of a consumer of all changes.
type world struct {
	services map[string]*corev1.Service
	slices   map[string]*discoveryv1.EndpointSlice
	node     service.Node
	model    *service.Model
	heard    map[service.Key]service.Frontend
}

func newWorld() *world {
	return &world{
		services: map[string]*corev1.Service{},
		slices:   map[string]*discoveryv1.EndpointSlice{},
		node:     nodeA,
		model:    newModel(nodeA),
		heard:    map[service.Key]service.Frontend{},
	}
}

// dice returns numbers below n. Ranges are small everywhere, so that Services collide.
type dice func(n int) int

func (d dice) of(words ...string) string { return words[d(len(words))] }

func (d dice) service() *corev1.Service {
	addr := func() string {
		return d.of("10.96.0.1", "10.96.0.2", "192.0.2.1", "192.0.2.2", "2001:db8::1", "127.0.0.1")
	}
	svc := web(named(d.of("a", "b", "c", "d"), int64(d(4))))
	switch d(4) {
	case 0:
		clusterIPs(d.of("10.96.0.1", "10.96.0.2"), d.of("fd00:96::1", "fd00:96::2"))(svc)
	case 1:
		clusterIPs("None")(svc)
	default:
		clusterIPs(d.of("10.96.0.1", "10.96.0.2", "10.96.0.3"))(svc)
	}
	ports(fmt.Sprintf("http:%d:%d", 80+d(2), 30080+d(2)), "dns:53/"+d.of("UDP", "TCP"))(svc)
	for range d(3) {
		svc.Spec.ExternalIPs = append(svc.Spec.ExternalIPs, addr())
	}
	for i, c := range []change{nodePort, loadBalancer(addr()), externalLocal, internalLocal, affinity(60), sources("192.0.2.0/24")} {
		if d(4) == 0 && (i != 0 || svc.Spec.Type != corev1.ServiceTypeLoadBalancer) {
			c(svc)
		}
	}
	return svc
}

func (d dice) slice() *discoveryv1.EndpointSlice {
	var list []string
	for range d(4) {
		list = append(list, fmt.Sprintf("10.244.%d.%d on=%s%s%s", d(2), 1+d(2), d.of("a", "b"),
			d.of("", " zones=east", " zones=west", " zones=west,east nodes=a"), d.of("", "", " unready", " unready terminating")))
	}
	es := of(d.of("a", "b", "c", ""), slice(d.of("r", "s", "t"), fmt.Sprintf("http:%d dns:53/UDP", 8080+d(2)), list...))
	if d(8) == 0 {
		es.Labels[corev1.IsHeadlessService] = ""
	}
	return es
}

// step changes one thing.
func (w *world) step(d dice) {
	switch d(8) {
	case 0, 1, 2:
		svc := d.service()
		w.services[svc.Name] = svc
		w.model.SetService(svcfacts.Service(svc))
	case 3, 4, 5:
		es := d.slice()
		w.slices[es.Name] = es
		w.model.SetSlice(svcfacts.Slice(es))
	case 6:
		if d(2) == 0 {
			name := d.of("a", "b", "c", "d")
			delete(w.services, name)
			w.model.DeleteService(nameOf(name))
		} else {
			name := d.of("r", "s", "t")
			delete(w.slices, name)
			w.model.DeleteSlice(nameOf(name))
		}
	case 7:
		switch d(4) {
		case 0:
			w.model.Replace(svcfacts.Services(slices.Collect(maps.Values(w.services))), svcfacts.Slices(slices.Collect(maps.Values(w.slices))))
		case 1: // objects that are missing in a list are deleted
			clear(w.slices)
			w.model.Replace(svcfacts.Services(slices.Collect(maps.Values(w.services))), nil)
		default:
			w.node = service.Node{Name: d.of("a", "b"), Zone: d.of("", "east", "west")}
			w.model.SetNode(w.node)
		}
	}
}

// hear applies the changes, and returns what is wrong with them.
func (w *world) hear() error {
	seen := map[service.Key]bool{}
	for _, c := range w.model.Changes() {
		here := map[service.Key]bool{}
		for _, f := range c.Old {
			if had, ok := w.heard[f.Key]; !ok || !had.Equal(f) {
				return fmt.Errorf("change of %s takes away %s, and there is %s", c.Service, line(f), line(had))
			}
			delete(w.heard, f.Key)
			here[f.Key] = true
		}
		for _, f := range c.New {
			if had, ok := w.heard[f.Key]; ok {
				return fmt.Errorf("change of %s adds %s beside %s", c.Service, line(f), line(had))
			}
			if f.Service != c.Service {
				return fmt.Errorf("change of %s adds %s of %s", c.Service, line(f), f.Service)
			}
			w.heard[f.Key] = f
			here[f.Key] = true
		}
		for k := range here {
			if seen[k] {
				return fmt.Errorf("%s is in two changes", k)
			}
			seen[k] = true
		}
		if len(here) == 0 {
			return fmt.Errorf("change of %s is empty", c.Service)
		}
	}
	return nil
}

// meant computes the expected frontends without a Model: of all Services that claim a key, the one with it as its ClusterIP gets it,
// then the oldest.
func (w *world) meant() []service.Frontend {
	all := slices.Collect(maps.Values(w.slices))
	slices.SortFunc(all, func(a, b *discoveryv1.EndpointSlice) int { return cmp.Compare(a.Name, b.Name) })
	age := map[service.Name]int64{}
	var claimed []service.Frontend
	for name, svc := range w.services {
		age[nameOf(name)] = svc.CreationTimestamp.Unix()
		claimed = append(claimed, slices.DeleteFunc(service.Frontends(svcfacts.Service(svc), svcfacts.Slices(all), w.node), func(f service.Frontend) bool {
			return f.Kind == service.ExternalIP && w.othersHave(name, f.Addr.String())
		})...)
	}
	others := func(f service.Frontend) int {
		if f.Kind == service.ClusterIP {
			return 0
		}
		return 1
	}
	slices.SortFunc(claimed, func(a, b service.Frontend) int {
		return cmp.Or(a.Compare(b.Key), others(a)-others(b), cmp.Compare(age[a.Service], age[b.Service]), cmp.Compare(a.Service.Name, b.Service.Name))
	})
	return slices.CompactFunc(claimed, func(a, b service.Frontend) bool { return a.Key == b.Key })
}

// othersHave says whether an address is a ClusterIP or a load balancer's of another Service than name.
func (w *world) othersHave(name, addr string) bool {
	for other, svc := range w.services {
		if other == name {
			continue
		}
		if slices.Contains(svc.Spec.ClusterIPs, addr) {
			return true
		}
		for _, in := range svc.Status.LoadBalancer.Ingress {
			if svc.Spec.Type == corev1.ServiceTypeLoadBalancer && in.IP == addr {
				return true
			}
		}
	}
	return false
}

func (w *world) check() error {
	if err := w.hear(); err != nil {
		return err
	}
	heard := slices.SortedFunc(maps.Values(w.heard), func(a, b service.Frontend) int { return a.Compare(b.Key) })
	if meant := w.meant(); !slices.EqualFunc(heard, meant, service.Frontend.Equal) {
		return fmt.Errorf("changes came to\n%q\nand there should be\n%q", lines(heard), lines(meant))
	}
	scratch := newModel(w.node)
	scratch.Replace(svcfacts.Services(slices.Collect(maps.Values(w.services))), svcfacts.Slices(slices.Collect(maps.Values(w.slices))))
	if got := w.model.Frontends(); !slices.EqualFunc(got, scratch.Frontends(), service.Frontend.Equal) {
		return fmt.Errorf("the model has\n%q\nand one made anew\n%q", lines(got), lines(scratch.Frontends()))
	}
	if got, want := fmt.Sprint(w.model.Problems()), fmt.Sprint(scratch.Problems()); got != want {
		return fmt.Errorf("problems are\n%s\nand of a model made anew\n%s", got, want)
	}
	if got, want := fmt.Sprint(w.model.HealthChecks()), fmt.Sprint(scratch.HealthChecks()); got != want {
		return fmt.Errorf("health checks are %s, and of a model made anew %s", got, want)
	}
	return w.explained()
}

// explained compares the explanations of endpoints with the backends of frontends.
func (w *world) explained() error {
	all := slices.Collect(maps.Values(w.slices))
	for name, svc := range w.services {
		in, out := map[string]bool{}, map[string]bool{}
		for _, f := range service.Frontends(svcfacts.Service(svc), svcfacts.Slices(all), w.node) {
			for _, e := range f.Inside.Endpoints {
				in[fmt.Sprint(f.PortName, f.Protocol, e)] = true
			}
			for _, e := range f.Outside.Endpoints {
				if f.Kind != service.ClusterIP {
					out[fmt.Sprint(f.PortName, f.Protocol, e)] = true
				}
			}
		}
		saidIn, saidOut := map[string]bool{}, map[string]bool{}
		for _, u := range svcfacts.Explain(svc, all, w.node) {
			at := fmt.Sprint(u.PortName, u.Protocol, u.Addr)
			if u.Inside {
				saidIn[at] = true
			}
			if u.Outside {
				saidOut[at] = true
			}
			if !u.Inside && !u.Outside && u.Why == "" {
				return fmt.Errorf("Explain does not say why %s of %s is not used", at, name)
			}
		}
		if !maps.Equal(in, saidIn) || !maps.Equal(out, saidOut) {
			return fmt.Errorf("of %s Explain says that these are used: %v, %v; frontends have %v, %v", name, saidIn, saidOut, in, out)
		}
	}
	return nil
}

func TestRandomChanges(t *testing.T) {
	for seed := range uint64(60) {
		random := rand.New(rand.NewPCG(seed, 0))
		w := newWorld()
		for i := range 120 {
			w.step(random.IntN)
			if random.IntN(3) == 0 { // otherwise several things happen before the next call
				if err := w.check(); err != nil {
					t.Fatalf("seed %d, step %d: %v", seed, i, err)
				}
			}
		}
	}
}

// FuzzModel throws the dice with the fuzzer's bytes. Maps are walked in another order each time, so what an input covers
// is not always the same, and the fuzzer would minimize for ever: run it with -fuzzminimizetime 1x.
func FuzzModel(f *testing.F) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		seed := make([]byte, 400)
		for i := range seed {
			seed[i] = byte(random.Uint32())
		}
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		w := newWorld()
		throw := func(n int) int {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return int(b) % n
		}
		for len(data) > 0 {
			w.step(throw)
			if throw(3) == 0 {
				if err := w.check(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := w.check(); err != nil {
			t.Fatal(err)
		}
	})
}
