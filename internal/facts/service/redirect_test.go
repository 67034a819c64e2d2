package service_test

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
)

var kubeDNS = service.Name{Namespace: "kube-system", Name: "kube-dns"}

func dnsFrontend(key string, port uint16, of service.Name, endpoints ...string) service.Frontend {
	f := service.Frontend{Key: service.Key{Addr: netip.MustParseAddr(key), Protocol: service.UDP, Port: port}, Service: of}
	for _, e := range endpoints {
		f.Inside.Endpoints = append(f.Inside.Endpoints, netip.MustParseAddrPort(e))
	}
	f.Outside = f.Inside
	return f
}

func TestRedirect(t *testing.T) {
	cache := []netip.Addr{netip.MustParseAddr("169.254.20.10")}
	dns := dnsFrontend("10.96.0.10", 53, kubeDNS, "10.244.1.2:53", "10.244.2.2:53")
	metrics := dnsFrontend("10.96.0.10", 9153, kubeDNS, "10.244.1.2:9153")
	six := dnsFrontend("fd00:96::a", 53, kubeDNS, "[fd00::2]:53")
	other := dnsFrontend("10.96.0.11", 53, service.Name{Namespace: "kube-system", Name: "other"}, "10.244.1.3:53")
	balanced := dns
	balanced.Kind = service.LoadBalancer
	balanced.Addr = netip.MustParseAddr("192.0.2.10")
	given := []service.Frontend{dns, metrics, six, other, balanced}
	before := slices.Clone(given)

	r := service.Redirect{Service: kubeDNS, Port: 53}
	if got := r.Frontends(given); !reflect.DeepEqual(got, given) {
		t.Errorf("without addresses: %v", got)
	}
	redirected := dns
	redirected.Inside = service.Backends{Endpoints: []netip.AddrPort{netip.MustParseAddrPort("169.254.20.10:53")}}
	if got, want := r.Set(cache), []service.Change{{Service: kubeDNS, Old: []service.Frontend{dns}, New: []service.Frontend{redirected}}}; !reflect.DeepEqual(got, want) {
		t.Errorf("Set: got %v, want %v", got, want)
	}
	if got := r.Set(cache); got != nil {
		t.Errorf("Set again: got %v, want none", got)
	}
	if got, want := r.Frontends(given), []service.Frontend{redirected, metrics, six, other, balanced}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if !reflect.DeepEqual(given, before) {
		t.Error("what was given has changed")
	}
	for endpoint, want := range map[string]bool{"169.254.20.10:53": true, "169.254.20.10:9153": false, "10.244.1.2:53": false} {
		if got := r.Includes(kubeDNS, netip.MustParseAddrPort(endpoint)); got != want {
			t.Errorf("Includes(%s) is %t", endpoint, got)
		}
	}
	if r.Includes(other.Service, netip.MustParseAddrPort("169.254.20.10:53")) {
		t.Error("another Service includes it")
	}

	// Changes of the servers' pods have no effect while r redirects. Afterwards r has them.
	fewer := dnsFrontend("10.96.0.10", 53, kubeDNS)
	if got := r.Changes([]service.Change{{Service: kubeDNS, Old: []service.Frontend{dns}, New: []service.Frontend{fewer}}}); len(got) > 0 {
		// Outside differs, and is not redirected.
		if len(got) != 1 || !got[0].New[0].Inside.Equal(redirected.Inside) || len(got[0].New[0].Outside.Endpoints) > 0 {
			t.Errorf("got %v", got)
		}
	}
	if got := r.Set(nil); len(got) != 1 || !got[0].New[0].Equal(fewer) {
		t.Errorf("redirected no more: got %v, want %v", got, fewer)
	}
}

// After any sequence of events, the changes add up to Frontends.
func TestRedirectChangesAgreeWithWhole(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	d := rand.New(rand.NewPCG(seed, 1))
	addrs := []string{"10.96.0.10", "10.96.0.11", "fd00:96::a"}
	names := []service.Name{kubeDNS, {Namespace: "default", Name: "web"}}
	pods := []string{"10.244.1.2:53", "10.244.2.2:53"}
	caches := [][]netip.Addr{nil, {netip.MustParseAddr("169.254.20.10")}, {netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd66::a")}}

	model, held := map[service.Key]service.Frontend{}, map[service.Key]service.Frontend{}
	r := service.Redirect{Service: kubeDNS, Port: 53}
	whole := func() []service.Frontend {
		var all []service.Frontend
		for _, f := range model {
			all = append(all, f)
		}
		slices.SortFunc(all, func(a, b service.Frontend) int { return a.Compare(b.Key) })
		return all
	}
	r.Frontends(nil)
	for step := range 2000 {
		var changes []service.Change
		if d.IntN(3) == 0 {
			changes = r.Set(caches[d.IntN(len(caches))])
		} else {
			c := service.Change{Service: names[d.IntN(2)]}
			addr := addrs[d.IntN(len(addrs))]
			f := dnsFrontend(addr, []uint16{53, 80}[d.IntN(2)], c.Service, pods[:d.IntN(3)]...)
			if old, found := model[f.Key]; found {
				c.Old = append(c.Old, old)
				delete(model, f.Key)
			}
			if d.IntN(3) > 0 {
				c.New = append(c.New, f)
				model[f.Key] = f
			}
			changes = r.Changes([]service.Change{c})
		}
		for _, c := range changes {
			for _, f := range c.Old {
				if have, found := held[f.Key]; !found || !have.Equal(f) {
					t.Fatalf("step %d: %v is said to have been, and was %v", step, f, have)
				}
				delete(held, f.Key)
			}
			for _, f := range c.New {
				held[f.Key] = f
			}
		}
		other := service.Redirect{Service: kubeDNS, Port: 53}
		other.Set(r.Addrs())
		want := other.Frontends(whole())
		if len(want) != len(held) {
			t.Fatalf("step %d: %d frontends, want %d", step, len(held), len(want))
		}
		for _, f := range want {
			if !held[f.Key].Equal(f) {
				t.Fatalf("step %d: %v, want %v", step, held[f.Key], f)
			}
		}
	}
}
