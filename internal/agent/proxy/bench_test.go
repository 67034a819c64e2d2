package proxy

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/testenv"
)

// BenchmarkProxy says what a proxy spends on the Services from nothing, on changes, and on changes beside a comparison, once
// all has been heard of. Times are of the process on its processors, which tell more than the clock on a busy machine,
// and of the clock.
//
//	go test ./internal/agent/proxy -run '^$' -bench '^BenchmarkProxy$' -benchtime 1x
func BenchmarkProxy(b *testing.B) {
	paths, ok := inside(b)
	if !ok {
		b.ReportAllocs() // there is nothing to time here
		return
	}
	for _, size := range [][2]int{{10_000, 10}, {50_000, 5}} {
		for _, mode := range modes {
			n := newNode(b, paths, mode)
			n.config.OwnPods = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")} // of so many pods few are on one node
			measure := func(what string, f func()) {
				runtime.GC()
				var before, after unix.Rusage
				testenv.Must(b, unix.Getrusage(unix.RUSAGE_SELF, &before))
				began := time.Now()
				f()
				took := time.Since(began)
				testenv.Must(b, unix.Getrusage(unix.RUSAGE_SELF, &after))
				user, system := time.Duration(after.Utime.Nano()-before.Utime.Nano()), time.Duration(after.Stime.Nano()-before.Stime.Nano())
				fmt.Printf("%d x %d, %s: %s: %v user, %v system, %v by the clock\n", size[0], size[1], mode, what, user, system, took)
			}
			step := func() {
				n.step(b.Context(), false)
				if s := n.Status(); !s.Ready || s.Problem != "" {
					b.Fatal(s)
				}
			}
			measure("heard of", func() { n.hear(size[0], size[1]) })
			measure("put into the kernel", step)
			measure("100 changes", func() {
				for i := range 100 {
					n.change(i, size[1])
					step()
				}
			})
			measure("set again", func() {
				n.whole = true
				step()
			})
			testenv.Must(b, n.kernel.rules.Delete("nobody's")) // as others do, so that the rules are not known to be the same
			measure("compared, and changes meanwhile", func() {
				var took []time.Duration
				n.compare(b.Context())
				for i, results := 0, n.results(); ; i++ {
					select {
					case c := <-results:
						if n.conclude(c); n.whole || c.err != nil {
							b.Fatalf("the comparison came to %+v", c)
						}
						slices.Sort(took)
						fmt.Printf("%d changes while %v were compared: %v (median), %v (99th)\n", len(took), c.took, took[len(took)/2], took[len(took)*99/100])
						return
					case <-time.After(5 * time.Millisecond):
						began := time.Now()
						n.change(i%size[0], size[1])
						step()
						took = append(took, time.Since(began))
					}
				}
			})
			n.config.Mode = netconf.ProxyOff
			measure("removed", func() { n.step(b.Context(), false) })
			n.stop()
		}
	}
}

// hear has the API server tell of so many Services, as it would of each.
func (n *node) hear(services, endpoints int) {
	for i := range services {
		s := web(fmt.Sprintf("s-%d", i), netip.AddrFrom4([4]byte{172, 16 + byte(i>>16), byte(i >> 8), byte(i)}).String())
		s.Spec.Ports = slices.Clip(s.Spec.Ports[:1])
		n.inbox.SetService(s)
		n.inbox.SetSlice(n.many(i, endpoints, 0))
	}
	n.inbox.wake()
}

// many are the endpoints of a Service, before a change or after it.
func (n *node) many(service, number, changed int) *discoveryv1.EndpointSlice {
	var list []string
	for j := range number {
		at := service*number + j
		list = append(list, netip.AddrFrom4([4]byte{10, byte(1 + at>>16 + 100*changed), byte(at >> 8), byte(at)}).String())
	}
	return endpoints(fmt.Sprintf("s-%d", service), list...)
}

func (n *node) change(i, number int) { n.inbox.SetSlice(n.many(i, number, 1)) }
