package connect_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// connector connects all the time to Services of which number i, 172.16.0.i, has endpoints in 10.i.0.0/16 alone, and wants
// every connection to meet one of these.
type connector struct {
	by    *connect.Translator // by which it asks what a connection met; nil asks for nothing but that there is one
	stop  chan struct{}
	wg    sync.WaitGroup
	times atomic.Int64
	mu    sync.Mutex
	bad   []string
}

func startConnecting(t testing.TB, by *connect.Translator, services, workers int) *connector {
	t.Helper()
	c := &connector{by: by, stop: make(chan struct{})}
	for w := range workers {
		c.wg.Go(func() {
			sender := newSocket(t, false, service.UDP) // one that is never connected
			defer sender.close()
			for i := w; ; i++ {
				select {
				case <-c.stop:
					return
				default:
				}
				n := 1 + i%services
				vip := at(fmt.Sprintf("172.16.0.%d", n), service.DNSPort)
				s := newSocket(t, w%2 == 1, service.UDP)
				err := s.connect(vip)
				if err != nil {
					c.wrong("%s: %v", vip, err)
				} else if by == nil {
				} else if got := s.peer(t); got != vip {
					c.wrong("%s has the peer %s", vip, got)
				} else if tr, found, err := by.Translated(s.cookie(t)); err != nil || !found || tr.Backend.Addr().As4()[1] != byte(n) {
					c.wrong("%s meets %v, %v", vip, tr.Backend, err)
				}
				s.close()
				if err := sender.send(vip); err != nil {
					c.wrong("a packet to %s: %v", vip, err)
				}
				c.times.Add(1)
			}
		})
	}
	return c
}

func (c *connector) wrong(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bad = append(c.bad, fmt.Sprintf(format, args...))
}

// more waits until n more connections were made.
func (c *connector) more(n int64) {
	for until := c.times.Load() + n; c.times.Load() < until; {
		time.Sleep(time.Millisecond)
	}
}

func (c *connector) end(t testing.TB) {
	t.Helper()
	close(c.stop)
	c.wg.Wait()
	if len(c.bad) > 0 {
		t.Errorf("%d of %d connections went wrong: %s", len(c.bad), c.times.Load(), c.bad[0])
	}
}

// someOf makes the frontends of services 1 to n, each with some endpoints.
func someOf(r *rand.Rand, n int) []service.Frontend {
	all := make([]service.Frontend, n)
	for i := range n {
		all[i] = frontend(fmt.Sprintf("172.16.0.%d:53/UDP", i+1))
		for j := range 1 + r.IntN(12) {
			all[i].Inside.Endpoints = append(all[i].Inside.Endpoints, at(fmt.Sprintf("10.%d.%d.%d", i+1, j, r.IntN(200)), 8080))
		}
		if i%4 == 0 {
			all[i].Affinity = time.Hour
		}
	}
	return all
}

// TestUnderChange changes endpoints while sockets connect.
func TestUnderChange(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	const services = 16 // as many as one socket may send to
	b.plan = plan(someOf(r, services)...)
	b.set(t)
	c := startConnecting(t, b.Translator, services, 3)
	for n := 0; n < 2000 || c.times.Load() < 5000; n++ {
		next := plan(someOf(r, services)...)
		if n%50 == 0 {
			b.plan = next
			if _, err := b.Set(b.plan); err != nil {
				t.Error(err)
			}
			continue
		}
		i := r.IntN(services)
		old := b.plan.Frontends[i]
		b.plan.Frontends[i] = next.Frontends[i]
		if err := b.Change([]service.Change{{Service: old.Service, Old: []service.Frontend{old}, New: next.Frontends[i : i+1]}}); err != nil {
			t.Error(err)
		}
	}
	c.end(t)
	b.check(t)
	fates, err := b.Fates()
	testenv.Must(t, err)
	t.Logf("seed %d: %d connections, %+v", seed, c.times.Load(), fates)
}

// kernel is what of the kernel's must outlive an agent: the ids of maps and links, and of the programs.
func (b *balancer) kernel(t testing.TB) (all map[string]uint32, programs map[string]uint32) {
	t.Helper()
	all, programs = map[string]uint32{}, map[string]uint32{}
	entries, err := os.ReadDir(b.opts.Dir)
	testenv.Must(t, err)
	for _, e := range entries {
		path := filepath.Join(b.opts.Dir, e.Name())
		if m, err := ebpf.LoadPinnedMap(path, nil); err == nil {
			info, err := m.Info()
			testenv.Must(t, err)
			id, _ := info.ID()
			all[e.Name()] = uint32(id)
			m.Close()
			continue
		}
		l, err := ebpflink.LoadPinnedLink(path, nil)
		testenv.Must(t, err)
		info, err := l.Info()
		testenv.Must(t, err)
		all[e.Name()], programs[e.Name()] = uint32(info.ID), uint32(info.Program)
		l.Close()
	}
	return all, programs
}

// TestRestart takes the agent away and brings it back, and another version of it, while sockets connect.
func TestRestart(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	const services = 5
	all := someOf(rand.New(rand.NewPCG(1, 1)), services)
	vip := addrPort("172.17.0.1:53")
	all = append(all, frontend("172.17.0.1:53/TCP", "10.200.0.1:8080"), frontend("172.17.0.1:53/UDP", "10.200.0.1:8080", "10.200.0.2:8080"))
	answer(t, addrPort("10.200.0.1:8080"))
	answer(t, addrPort("10.200.0.2:8080"))
	b.plan = plan(all...)
	b.set(t)
	ids, programs := b.kernel(t)
	if len(ids) != 17 || len(programs) != 9 {
		t.Errorf("what is pinned: %v", ids)
	}
	connected, packets := newSocket(t, false, service.TCP), newSocket(t, false, service.UDP)
	defer connected.close()
	defer packets.close()
	testenv.Must(t, connected.connect(vip))
	testenv.Must(t, packets.send(vip))
	given, _ := packets.receive(t)

	c := startConnecting(t, b.Translator, services, 2)
	c.more(100)
	for range 3 {
		b.open(t)
		c.more(100)
		if n := b.set(t); n != 0 {
			t.Errorf("a restart changes %d", n)
		}
		c.more(100)
		b.Close()
		c.more(100)
	}
	if again, same := b.kernel(t); fmt.Sprint(again, same) != fmt.Sprint(ids, programs) {
		t.Errorf("a restart makes of\n%v %v\n%v %v", ids, programs, again, same)
	}
	if got := connected.peer(t); got != vip {
		t.Errorf("after a restart the peer is %s", got)
	}
	for range 10 {
		testenv.Must(t, packets.send(vip))
		if who, from := packets.receive(t); who != given || from != vip {
			t.Errorf("after a restart %s answers as %s, and it was %s", who, from, given)
		}
	}
	c.end(t)

	// A map of another version: its programs go on until all is there for the new ones.
	c = startConnecting(t, nil, services, 2)
	testenv.Must(t, os.Remove(filepath.Join(b.opts.Dir, pin.Affinity)))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: pin.Affinity, Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 7})
	testenv.Must(t, err)
	testenv.Must(t, m.Pin(filepath.Join(b.opts.Dir, pin.Affinity)))
	m.Close()
	former := filepath.Join(b.opts.Dir, "fathom_sends")
	m, err = ebpf.NewMap(&ebpf.MapSpec{Name: "fathom_sends", Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 7})
	testenv.Must(t, err)
	testenv.Must(t, m.Pin(former))
	m.Close()
	b.open(t)
	for range 100 { // of the other version's programs
		if who := reach(t, false, service.UDP, vip); who.Addr().As4()[1] != 200 {
			t.Error(who)
		}
	}
	c.more(100)
	b.set(t)
	c.more(100)
	c.end(t)
	if _, err := os.Stat(former); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a map that only an earlier version had is still pinned: %v", err)
	}
	if got := connected.peer(t); got != vip {
		t.Errorf("with another map of clients the peer is %s", got)
	}
	again, others := b.kernel(t)
	use := []string{pin.Connect4, pin.Connect6, pin.Sendmsg4, pin.Sendmsg6} // the map
	for name, id := range programs {
		if (others[name] != id) != slices.Contains(use, name) || again[name] != ids[name] {
			t.Errorf("%s: with other maps the program %d of the link %d is %d of %d", name, id, ids[name], others[name], again[name])
		}
	}
	reach(t, false, service.TCP, vip)

	b.Close()
	testenv.Must(t, connect.Remove(b.opts.Dir))
	testenv.Must(t, connect.Remove(b.opts.Dir))
	if _, err := os.Stat(b.opts.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after RemoveConnect: %v", err)
	}
	dir, err := os.Open(b.opts.Cgroup)
	testenv.Must(t, err)
	defer dir.Close()
	for _, kind := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCgroupInetSockRelease} {
		if q, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: int(dir.Fd()), Attach: kind}); err != nil || len(q.Programs) > 0 {
			t.Errorf("%v: %+v, %v", kind, q, err)
		}
	}
	s := newSocket(t, false, service.TCP)
	defer s.close()
	if err := s.connect(vip); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("after RemoveConnect: %v", err)
	}
	b.open(t)
	b.set(t)
	reach(t, false, service.TCP, vip)
}

// TestNumbers has a UDP socket come again after its endpoint is long gone, with the number of a set that the agent
// would give again if it looked at those alone that are there.
func TestNumbers(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	vip := addrPort("172.16.0.1:80")
	ends := []string{"10.0.0.1:8080", "10.0.0.2:8080", "10.0.0.3:8080"}
	for _, e := range ends {
		answer(t, addrPort(e))
	}
	s := newSocket(t, false, service.UDP)
	defer s.close()
	for _, endpoints := range [][]string{ends[:1], nil, ends[1:2], nil, ends[2:]} {
		b.plan = plan(frontend("172.16.0.1:80/UDP", endpoints...))
		b.set(t)
		b.Close()
		b.open(t)
		err := s.send(vip)
		if len(endpoints) == 0 {
			if !errors.Is(err, refusal()) {
				t.Errorf("nobody is there: %v", err)
			}
			continue
		}
		testenv.Must(t, err)
		if who, from := s.receive(t); who.String() != endpoints[0] || from != vip {
			t.Errorf("%s answers as %s, and only %v is there", who, from, endpoints)
		}
	}
}

// TestOtherCgroup has the programs follow to another cgroup.
func TestOtherCgroup(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	b.plan = plan(frontend("172.16.0.1:80/TCP", "10.0.0.1:8080"))
	answer(t, addrPort("10.0.0.1:8080"))
	below := filepath.Join(b.opts.Cgroup, "below")
	testenv.Must(t, os.Mkdir(below, 0o755))
	here := b.opts.Cgroup
	b.Close()
	b.opts.Cgroup = below
	b.open(t)
	b.set(t)
	s := newSocket(t, false, service.TCP)
	defer s.close()
	if err := s.connect(addrPort("172.16.0.1:80")); !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("from outside the cgroup: %v", err)
	}
	testenv.Must(t, os.Remove(below))
	b.Close()
	b.opts.Cgroup = here
	b.open(t)
	if n := b.set(t); n != 9 {
		t.Errorf("another cgroup changes %d", n)
	}
	reach(t, false, service.TCP, addrPort("172.16.0.1:80"))
}

// TestChanges makes random changes, one way and the other, and compares.
func TestChanges(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	addrs := []netip.Addr{netip.MustParseAddr("172.16.0.1"), netip.MustParseAddr("172.16.0.2"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")}
	have := map[service.Key]service.Frontend{}
	for step := range 400 {
		changes := map[string]*service.Change{}
		for range 1 + r.IntN(4) {
			key := service.Key{Addr: []netip.Addr{addrs[r.IntN(4)], netip.IPv4Unspecified(), netip.IPv6Unspecified()}[r.IntN(3)],
				Protocol: []service.Protocol{service.TCP, service.UDP, service.SCTP}[r.IntN(3)], Port: 80 + uint16(r.IntN(3))}
			old, there := have[key]
			owner := old.Service
			f := frontend("172.16.9.9:80/TCP")
			f.Key = key
			if !there {
				f.Service.Name = fmt.Sprint(r.IntN(3))
				owner = f.Service
			}
			f.Service = owner
			c := changes[owner.Name]
			if c == nil {
				c = &service.Change{Service: owner}
				changes[owner.Name] = c
			}
			if slices.ContainsFunc(slices.Concat(c.Old, c.New), func(x service.Frontend) bool { return x.Key == key }) {
				continue
			}
			if there {
				c.Old = append(c.Old, old)
			}
			if there && r.IntN(3) == 0 {
				delete(have, key)
				continue
			}
			for i := range r.IntN(5) {
				f.Inside.Endpoints = append(f.Inside.Endpoints, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), uint16(r.IntN(3)+1)))
			}
			f.Inside.Drop = r.IntN(2) == 0
			f.Affinity = time.Duration(r.IntN(2)) * time.Minute
			if r.IntN(5) == 0 {
				f.Sources = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}
			}
			if f.Addr.IsUnspecified() {
				f.Kind = service.NodePort
			}
			have[key] = f
			c.New = append(c.New, f)
		}
		var list []service.Change
		for _, c := range changes {
			list = append(list, *c)
		}
		var all []service.Frontend
		for _, f := range have {
			all = append(all, f)
		}
		b.plan = plan(all...)
		if step/50%2 == 0 { // node addresses meet addresses of Services now and then
			b.plan.NodePortAddrs = []netip.Addr{addrs[0], addrs[2]}
		}
		if step%20 == 19 || step%50 == 0 { // the node's addresses change with all
			_, err := b.Set(b.plan)
			testenv.Must(t, err)
		} else {
			testenv.Must(t, b.Change(list))
		}
		got, err := b.Frontends()
		testenv.Must(t, err)
		if want := service.BalancedOf(b.plan); !slices.EqualFunc(got, want, service.Balanced.Equal) {
			t.Fatalf("step %d: the kernel holds\n%v\nwant\n%v", step, got, want)
		}
		if step%10 == 0 {
			b.check(t) // which also finds sets that no frontend has
		}
		if step%50 == 49 {
			damaged := b.damage(t, r)
			if n, err := b.Set(b.plan); err != nil || n == 0 && damaged > 0 {
				t.Fatalf("step %d: the maps are damaged, and Set changes %d, %v", step, n, err)
			}
			b.check(t)
		}
	}
}

// damage takes entries away behind the agent's back, and says how many.
func (b *balancer) damage(t *testing.T, r *rand.Rand) int {
	t.Helper()
	n := 0
	for _, name := range []string{pin.Services, pin.Backends} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, name), nil)
		testenv.Must(t, err)
		var keys [][]byte
		var key, value []byte
		for i := m.Iterate(); i.Next(&key, &value); {
			keys = append(keys, slices.Clone(key))
		}
		for _, key := range keys[:min(len(keys), 1+r.IntN(3))] {
			testenv.Must(t, m.Delete(key))
			n++
		}
		m.Close()
	}
	m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, pin.Node), nil)
	testenv.Must(t, err)
	defer m.Close()
	testenv.Must(t, m.Update(uint32(1), uint64(0), ebpf.UpdateAny)) // which number was given last
	return n
}
