package fastpath_test

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// BenchmarkPath measures the ways between two pods in turns, so that what else the machine does meets all alike, and
// reports each as a ratio to a plain pair of devices between two namespaces. RR and CRR are netperf's: a byte there
// and back on one connection, and a connection for each. The programs use plain blocking system calls: a runtime's
// own cost would make all ways look the same. Once what is counted is transactions, or bytes, a second; and once a second
// of CPU time of both ends, which share one CPU: that says what the way itself costs, and less of the machine's other
// work.
//
//	go test ./internal/kernel/bpf/fastpath -run '^$' -bench Path -benchtime 40x
func BenchmarkPath(b *testing.B) {
	for _, family := range []int{0, 1} {
		for _, across := range []bool{false, true} {
			where := "same-node"
			if across {
				where = "two-nodes"
			}
			for _, by := range []meter{clock, cpu} {
				b.Run(fmt.Sprintf("%s/IPv%d/%s", where, 4+2*family, by.name), func(b *testing.B) { benchmark(b, by, across, family) })
			}
		}
	}
}

// meter is what time is measured by.
type meter struct {
	name string
	now  func() time.Duration
	cpus int // that both ends share
}

var (
	began = time.Now()
	clock = meter{"clock", func() time.Duration { return time.Since(began) }, runtime.NumCPU()}
	cpu   = meter{"cpu", cpuTime, 1}
)

type way struct {
	name string
	from *link.Namespace
	to   netip.Addr
}

func benchmark(b *testing.B, by meter, across bool, family int) {
	var ways []way
	x, y := linktest.Namespace(b), linktest.Namespace(b)
	testenv.Must(b, x.SetPair(link.Device{Name: "eth0", Alias: "x"}, y, link.Device{Name: "eth0", Alias: "x"}))
	testenv.Must(b, x.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}))
	testenv.Must(b, y.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")}))
	ways = append(ways, way{"plain", x, netip.MustParseAddr([]string{"192.0.2.2", "2001:db8::2"}[family])})
	serveBlocking(b, y, by)
	for _, kind := range []string{"routed", "tracked", "fast", "fast-untracked", "fast-judged", "tracked-judged"} {
		var nodes []*node
		var from, to pod
		if across {
			n1, n2, pods := twoNodes(b, podnet.Direct, fastpath.Options{})
			nodes, from, to = []*node{n1, n2}, pods[0][0], pods[1][0]
		} else {
			n := newNode(b, "a", fastpath.Options{})
			from, to = n.pod(b, 1, 2), n.pod(b, 1, 3)
			n.proxy(b, to)
			n.open(b)
			nodes = []*node{n}
		}
		for _, n := range nodes {
			n.plan.Fast = strings.HasPrefix(kind, "fast")
			if strings.HasSuffix(kind, "-judged") {
				n.isolate(b, from, to)
			}
			n.set(b)
			if kind == "routed" || kind == "fast-untracked" {
				linktest.Run(b, n.Namespace, "nft", "flush", "ruleset")
			}
			if !n.plan.Fast {
				n.path.Close()
				testenv.Must(b, fastpath.Remove(n.Namespace, n.opts.Dir))
			}
		}
		serveBlocking(b, to.Namespace, by)
		ways = append(ways, way{kind, from.Namespace, to.addrs[family]})
	}
	for _, w := range ways {
		testenv.Must(b, w.from.Sysctl("ipv4/ip_local_port_range", "1024 65535"))
		testenv.Must(b, w.from.Sysctl("ipv4/tcp_tw_reuse", "1"))
	}
	rates := map[string]map[string][]float64{}
	for _, w := range ways {
		rates[w.name] = map[string][]float64{}
	}
	b.ResetTimer()
	for i := range b.N {
		for j := range ways {
			w := ways[(i+j)%len(ways)]
			testenv.Must(b, w.from.Do(func() error {
				by.place()
				for name, measure := range map[string]func(netip.Addr, meter) (float64, error){"RR": measureRR, "CRR": measureCRR, "stream": measureStream} {
					rate, err := measure(w.to, by)
					if err != nil {
						return fmt.Errorf("%s, %s: %w", w.name, name, err)
					}
					rates[w.name][name] = append(rates[w.name][name], rate)
				}
				return nil
			}))
		}
	}
	b.StopTimer()
	for _, name := range []string{"RR", "CRR", "stream"} {
		plain := best(rates["plain"][name])
		b.Logf("%-7s plain %.0f a second", name, plain)
		for _, w := range ways[1:] {
			b.ReportMetric(best(rates[w.name][name])/plain, name+"-"+w.name)
		}
	}
	b.ReportMetric(0, "ns/op")
}

// isolate has policies isolate two pods in both directions, of which others are about as well: there are 1,000 policies for 200 pods of 50 namespaces.
func (n *node) isolate(b *testing.B, from, to pod) {
	b.Helper()
	m := policy.NewModel("a")
	app := func(i int) policy.Selector {
		return policy.Selector{{Key: "app", Operator: policy.In, Values: []string{fmt.Sprint("a", i%20)}}}
	}
	for i := range 1000 {
		p := &policy.Policy{ID: policy.ID{Kind: "NetworkPolicy", Name: service.Name{Namespace: fmt.Sprint("n", i%50), Name: fmt.Sprint("p", i)}}, Subject: app(i / 50), Isolates: [2]bool{true, true}}
		for _, d := range policy.Directions {
			p.Rules[d] = []policy.Rule{
				{Position: "0", Peers: []policy.Peer{{Pods: &policy.Pods{Pods: app(i % 7)}}}, Ports: []policy.Port{{Protocol: service.TCP, From: uint16(1000 + i), To: uint16(1010 + i)}}},
				{Position: "1", Peers: []policy.Peer{{Pods: &policy.Pods{Namespace: p.Namespace, Pods: app(i / 50)}}}, Ports: []policy.Port{{Protocol: service.TCP, From: 8080, To: 8089}}},
				{Position: "2", Peers: []policy.Peer{{Block: policy.Block{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i >> 8), byte(i)}), 32)}}}, AnyPort: true},
			}
		}
		m.SetPolicy(p)
	}
	for i := range 200 {
		p := policy.Pod{Name: service.Name{Namespace: fmt.Sprint("n", i%50), Name: fmt.Sprint("p", i)}, Node: []string{"a", "b"}[i/50%2], Labels: map[string]string{"app": fmt.Sprint("a", i/50)},
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 245, 0, byte(i)})}}
		m.SetPod(p)
	}
	var ranges []netip.Prefix
	for i, p := range []pod{from, to} {
		own := "b"
		if _, _, err := n.Index(p.host); err == nil {
			own = "a"
			for _, a := range p.addrs {
				ranges = append(ranges, netip.PrefixFrom(a, a.BitLen()))
			}
		}
		m.SetPod(policy.Pod{Name: service.Name{Namespace: "n0", Name: fmt.Sprint("own", i)}, Node: own, Labels: map[string]string{"app": "a0"}, Addrs: p.addrs})
	}
	f := m.Facts()
	rules, err := ruleset.Open(n.ns)
	testenv.Must(b, err)
	b.Cleanup(rules.Close)
	_, err = rules.SetPolicies(f, ranges)
	testenv.Must(b, err)
	_, err = n.path.Policies().Set(f)
	testenv.Must(b, err)
	n.plan.Free = map[netip.Addr]bool{}
}

// best is the best but for a tenth: what others do only ever costs.
func best(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)*9/10]
}

func address(a netip.Addr, port int) (int, unix.Sockaddr) {
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Addr: a.As4(), Port: port}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Addr: a.As16(), Port: port}
}

// serveBlocking answers each byte with a byte on port 8081, and swallows on port 8082.
func serveBlocking(b *testing.B, n *link.Namespace, by meter) {
	b.Helper()
	for _, port := range []int{8081, 8082} {
		var l int
		testenv.Must(b, n.Do(func() error {
			_, at := address(netip.IPv6Unspecified(), port)
			var err error
			if l, err = unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			if err := unix.Bind(l, at); err != nil {
				return err
			}
			return unix.Listen(l, 128)
		}))
		b.Cleanup(func() { _ = unix.Shutdown(l, unix.SHUT_RDWR) }) // which ends accept
		go func() {
			runtime.LockOSThread()
			by.place()
			defer unix.Close(l)
			buf := make([]byte, 256<<10)
			for {
				c, _, err := unix.Accept(l)
				if err != nil {
					return
				}
				_ = unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
				for {
					size, err := unix.Read(c, buf)
					if err != nil || size == 0 {
						break
					}
					if port == 8081 {
						if _, err := unix.Write(c, buf[:1]); err != nil {
							break
						}
					}
				}
				unix.Close(c)
			}
		}()
	}
}

func connect(to netip.Addr, port int) (int, error) {
	family, at := address(to, port)
	c, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(c, at); err != nil {
		unix.Close(c)
		return -1, err
	}
	return c, unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
}

func measureRR(to netip.Addr, by meter) (float64, error) {
	c, err := connect(to, 8081)
	if err != nil {
		return 0, err
	}
	defer unix.Close(c)
	return by.loop(func(buf []byte) (int, error) {
		if _, err := unix.Write(c, buf[:1]); err != nil {
			return 0, err
		}
		return unix.Read(c, buf)
	})
}

func measureCRR(to netip.Addr, by meter) (float64, error) {
	return by.loop(func(buf []byte) (int, error) {
		c, err := connect(to, 8081)
		if err != nil {
			return 0, err
		}
		defer unix.Close(c)
		if _, err := unix.Write(c, buf[:1]); err != nil {
			return 0, err
		}
		return unix.Read(c, buf[:1])
	})
}

func measureStream(to netip.Addr, by meter) (float64, error) {
	c, err := connect(to, 8082)
	if err != nil {
		return 0, err
	}
	defer unix.Close(c)
	return by.loop(func(buf []byte) (int, error) { return unix.Write(c, buf) })
}

// slice is how long a way is measured at a time.
const slice = 25 * time.Millisecond

func (m meter) loop(do func([]byte) (int, error)) (float64, error) {
	buf := make([]byte, 128<<10)
	total, began := 0, m.now()
	for {
		size, err := do(buf)
		if err != nil {
			return 0, err
		}
		total += size
		if took := m.now() - began; took >= slice {
			return float64(total) / took.Seconds(), nil
		}
	}
}

func cpuTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

// place keeps the thread on the machine's last CPUs.
func (m meter) place() {
	var set unix.CPUSet
	for i := range m.cpus {
		set.Set(runtime.NumCPU() - 1 - i)
	}
	_ = unix.SchedSetaffinity(0, &set)
}
