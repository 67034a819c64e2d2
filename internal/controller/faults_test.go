package controller_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// through has the controller meet the API server through a proxy. Leases are let through: a controller that has lost its
// own does nothing, and there would be nothing to see.
func (c *cluster) through() (set func(fault func(*http.Request) testenv.Fault), requests func() int) {
	front := testenv.NewFaultProxy(c, c.ownConfig)
	own, err := kube.Connect(front.Kubeconfig)
	c.must(err)
	c.own = own
	set = func(fault func(*http.Request) testenv.Fault) {
		front.Set(func(r *http.Request) testenv.Fault {
			if fault == nil || strings.Contains(r.URL.Path, "/leases") {
				return testenv.Fault{}
			}
			return fault(r)
		})
	}
	return set, func() (n int) {
		for what, k := range front.Requests() {
			if !strings.HasSuffix(what, " leases") {
				n += k
			}
		}
		return n
	}
}

// TestFaults: a controller behind an API server that hangs or fails goes on to look, asks no more than is due, gives no
// address twice, and has given all when the faults have ended.
func TestFaults(t *testing.T) {
	c := start(t)
	set, requests := c.through()
	c.must(c.pool("p", "[192.0.2.0/26]"))
	c.service("first", ", loadBalancerIP: 192.0.2.1")
	c.run("one")
	c.addresses("first", "192.0.2.1")

	// No write is answered but those of events: that of one Service does not hold up what is told of another. (An event that
	// is not answered does hold up the next ones. They are sent one after the other.)
	set(func(r *http.Request) testenv.Fault {
		if r.Method == http.MethodPatch && !strings.Contains(r.URL.Path, "/events/") {
			return testenv.Hang
		}
		return testenv.Fault{}
	})
	for i := range 20 {
		c.service(fmt.Sprint("s", i), "")
	}
	c.service("taken", ", loadBalancerIP: 192.0.2.1")
	c.event("taken", "AddressInUse", "Service default/first has it")

	seed := rand.Uint64()
	t.Log("seed", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	before, began := requests(), time.Now()
	set(func(r *http.Request) testenv.Fault {
		switch n := random.IntN(8); {
		case n == 0 && testenv.IsWatch(r):
			return testenv.Expire
		case n == 1:
			return testenv.Fail(http.StatusGone, "Expired", "")
		case n == 2:
			return testenv.Fail(http.StatusTooManyRequests, "TooManyRequests", "1")
		case n == 3:
			return testenv.Fail(http.StatusInternalServerError, "InternalError", "")
		case n == 4:
			return testenv.Fault{Delay: 20 * time.Millisecond, Cut: 1 + random.IntN(4000)}
		case n == 5 && !testenv.IsWatch(r):
			return testenv.Hang
		}
		return testenv.Fault{}
	})
	// What waited is tried at once when the connections are cut; only after that does the rate say something.
	c.await(func() bool { return requests()-before > 30 && time.Since(began) > 5*time.Second }, func() string { return fmt.Sprint(requests()-before, " requests") })
	n, took := requests()-before, time.Since(began)
	t.Logf("%d requests in %v", n, took)
	if rate := float64(n) / took.Seconds(); rate > 50 {
		t.Errorf("%.0f requests in a second to a server that refuses them", rate)
	}
	set(nil)
	var how string
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if how = c.given(22 - 1); how == "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(how)
		}
	}
	c.must(c.client.CoreV1().Services("default").Delete(t.Context(), "first", metav1.DeleteOptions{}))
	c.addresses("taken", "192.0.2.1")
}

// TestSlowWrite: an address that a write under way may give to one Service is given to no other meanwhile, though that one
// asks for it and has precedence.
func TestSlowWrite(t *testing.T) {
	c := start(t)
	set, _ := c.through()
	c.must(c.pool("p", "[192.0.2.1/32]"))
	begun, goes := make(chan struct{}), make(chan struct{})
	begin := sync.OnceFunc(func() { close(begun) })
	set(func(r *http.Request) testenv.Fault {
		if r.Method == http.MethodPatch && strings.HasSuffix(r.URL.Path, "/services/chooses/status") {
			begin()
			return testenv.Fault{Wait: goes}
		}
		return testenv.Fault{}
	})
	c.service("chooses", "")
	c.run("one")
	<-begun
	c.service("asks", ", loadBalancerIP: 192.0.2.1")
	c.event("chooses", "AddressPoolExhausted", "") // now asks is to have it
	c.service("late", ", loadBalancerIP: 192.0.2.1")
	c.event("late", "AddressInUse", "Service default/asks has it")
	c.addresses("asks")
	close(goes)
	c.addresses("chooses", "192.0.2.1")
	c.event("asks", "AddressInUse", "Service default/chooses has it")
	c.addresses("asks")
}

// given says what is wrong if not so many Services have an address, or two have one.
func (c cluster) given(want int) string {
	l, err := c.client.CoreV1().Services("default").List(c.Context(), metav1.ListOptions{})
	c.must(err)
	owner := map[string]string{}
	for _, s := range l.Items {
		for _, in := range s.Status.LoadBalancer.Ingress {
			if other := owner[in.IP]; other != "" {
				c.Fatalf("%s is of %s and of %s", in.IP, other, s.Name)
			}
			owner[in.IP] = s.Name
		}
	}
	if len(owner) != want {
		return fmt.Sprintf("%d Services have an address, want %d", len(owner), want)
	}
	return ""
}
