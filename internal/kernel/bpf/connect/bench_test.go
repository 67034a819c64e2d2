package connect_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/testenv"
)

// BenchmarkConnect compares connections to a Service with those to its endpoint, in turns, and says what loading and
// changing take. CRR is a TCP connection, its answer and its end; connect is connect() of a resolver's UDP socket alone, and
// send a packet of one that is not connected. Ratios are of times: 1 is that of the endpoint itself.
//
//	go test ./internal/kernel/bpf/connect -run '^$' -bench '^BenchmarkConnect$' -v
func BenchmarkConnect(b *testing.B) {
	n := inside(b)
	if n == nil {
		b.ReportAllocs() // there is nothing to time here
		return
	}
	n.Close()
	began := time.Now()
	n.open(b)
	fmt.Printf("OpenConnect: %v\n", time.Since(began))
	direct := addrPort("10.0.0.1:8080")
	answer(b, direct)
	for _, size := range []int{10, 10_000} {
		all := make([]service.Frontend, size)
		for i := range size {
			all[i] = frontend(fmt.Sprintf("172.%d.%d.%d:80/TCP", 16+i/65536, i/256%256, i%256))
			for j := range 10 {
				all[i].Inside.Endpoints = append(all[i].Inside.Endpoints, at(fmt.Sprintf("10.%d.%d.%d", 1+j, i/256%256, i%256), 8080))
			}
		}
		udp := frontend("172.15.0.1:80/UDP", direct.String())
		n.plan = plan(append(all, frontend("172.15.0.1:80/TCP", direct.String()), frontend("172.15.0.1:53/UDP", direct.String()), udp)...)
		began := time.Now()
		_, err := n.Set(n.plan)
		testenv.Must(b, err)
		fmt.Printf("%d Services: Set from nothing %v\n", size, time.Since(began))
		began = time.Now()
		_, err = n.Set(n.plan)
		testenv.Must(b, err)
		fmt.Printf("%d Services: Set again %v\n", size, time.Since(began))
		var took []time.Duration
		for i := range 1000 {
			old := n.plan.Frontends[i%size+3]
			next := old
			next.Inside.Endpoints = slices.Clone(old.Inside.Endpoints)
			next.Inside.Endpoints[9] = netip.AddrPortFrom(next.Inside.Endpoints[9].Addr(), uint16(9000+i))
			n.plan.Frontends[i%size+3] = next
			began := time.Now()
			testenv.Must(b, n.Change([]service.Change{{Service: old.Service, Old: []service.Frontend{old}, New: []service.Frontend{next}}}))
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		fmt.Printf("%d Services: one change %v (median), %v (99th)\n", size, took[500], took[990])
		vip := addrPort("172.15.0.1:80")
		for _, m := range []struct {
			what string
			vip  netip.AddrPort
			do   func(netip.AddrPort)
		}{
			{"CRR", vip, func(to netip.AddrPort) { reach(b, false, service.TCP, to) }},
			{"connect", addrPort("172.15.0.1:53"), func(to netip.AddrPort) {
				s := newSocket(b, false, service.UDP)
				testenv.Must(b, s.connect(to))
				s.close()
			}},
		} {
			a, v := turns(func() { m.do(direct) }, func() { m.do(m.vip) })
			fmt.Printf("%d Services: %s %.2f of %v\n", size, m.what, float64(v)/float64(a), a)
		}
		s := newSocket(b, false, service.UDP)
		send := func(to netip.AddrPort) func() {
			sa := s.sockaddr(to)
			return func() { testenv.Must(b, unix.Sendto(s.fd, []byte("?"), 0, sa)) }
		}
		a, v := turns(send(direct), send(vip))
		fmt.Printf("%d Services: send %.2f of %v\n", size, float64(v)/float64(a), a)
		s.close()
	}
}

// turns measures two things in turns and returns the median of each.
func turns(x, y func()) (time.Duration, time.Duration) {
	const each = 50
	var took [2][]time.Duration
	for range 60 {
		for i, f := range []func(){x, y} {
			began := time.Now()
			for range each {
				f()
			}
			took[i] = append(took[i], time.Since(began)/each)
		}
	}
	for i := range took {
		slices.Sort(took[i])
	}
	return took[0][len(took[0])/2], took[1][len(took[1])/2]
}
