package connect_test

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// plan returns a plan of the sorted frontends.
func plan(frontends ...service.Frontend) service.Plan {
	slices.SortFunc(frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	return service.Plan{Frontends: frontends}
}

// sides are the combinations of a socket's family and an address's family.
var sides = []struct {
	name   string
	v6     bool
	vip    string
	others string // another Service
	ends   []string
}{
	{"IPv4", false, "172.16.0.1", "172.16.0.2", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}},
	{"IPv4 by an IPv6 socket", true, "172.16.0.1", "172.16.0.2", []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}},
	{"IPv6", true, "fd02::1", "fd02::2", []string{"fd01::1", "fd01::2", "fd01::3"}},
}

func at(ip string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(ip), port)
}

// TestConnect reaches Services by all kinds of sockets and calls.
func TestConnect(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	var all []service.Frontend
	for _, s := range sides[1:] {
		for _, p := range []string{"/TCP", "/UDP"} {
			var ends, other []string
			for _, e := range s.ends {
				ends, other = append(ends, at(e, 8080).String()), append(other, at(e, 8081).String())
			}
			all = append(all, frontend(at(s.vip, 80).String()+p, ends...), frontend(at(s.others, 80).String()+p, other...),
				frontend(at(s.vip, 81).String()+p)) // nobody
			// Only resolvers' connected UDP sockets get an endpoint.
			all = append(all, frontend(at(s.vip, service.DNSPort).String()+p, ends...), frontend(at(s.others, service.DNSPort).String()+p))
			drop := frontend(at(s.vip, 82).String() + p)
			drop.Inside.Drop = true
			some := frontend(at(s.vip, 83).String()+p, ends...)
			some.Sources = []netip.Prefix{}
			all = append(all, drop, some)
		}
		for _, e := range s.ends {
			answer(t, at(e, 8080))
			answer(t, at(e, 8081))
		}
	}
	b.plan = plan(all...)
	if b.set(t) == 0 {
		t.Error("the first Set changes nothing")
	}
	for _, s := range sides {
		for _, p := range []service.Protocol{service.TCP, service.UDP} {
			t.Run(fmt.Sprintf("%s %s", s.name, p), func(t *testing.T) {
				vip, nobody := at(s.vip, 80), at(s.vip, 81)
				if p == service.UDP {
					vip, nobody = at(s.vip, service.DNSPort), at(s.others, service.DNSPort)
				}
				met := map[netip.AddrPort]bool{}
				for range 60 {
					who := reach(t, s.v6, p, vip)
					if !slices.Contains(s.ends, who.Addr().String()) || who.Port() != 8080 {
						t.Fatalf("%s meets %s", vip, who)
					}
					met[who] = true
				}
				if len(met) != len(s.ends) {
					t.Errorf("60 connections meet %v", met)
				}
				c := newSocket(t, s.v6, p)
				defer c.close()
				testenv.Must(t, c.connect(vip))
				if got := c.peer(t); got != vip {
					t.Errorf("the peer is %s, want %s", got, vip)
				}
				tr, found, err := b.Translated(c.cookie(t))
				if err != nil || !found || tr.Frontend != vip || tr.Protocol != p || !slices.Contains(s.ends, tr.Backend.Addr().String()) {
					t.Errorf("translated: %+v, %v, %v", tr, found, err)
				}
				list, err := b.Translations()
				if err != nil || !slices.Contains(list, tr) {
					t.Errorf("%+v is not among %+v, %v", tr, list, err)
				}
				for to, want := range map[netip.AddrPort]error{nobody: refusal(), at(s.vip, 82): unix.ENETUNREACH, at(s.vip, 83): unix.ENETUNREACH} {
					d := newSocket(t, s.v6, p)
					if err := d.connect(to); !errors.Is(err, want) {
						t.Errorf("%s: %v, want %v", to, err, want)
					}
					if p == service.UDP {
						if err := d.send(to); !errors.Is(err, want) {
							t.Errorf("sending to %s: %v, want %v", to, err, want)
						}
					}
					d.close()
				}
				if p == service.UDP {
					_, err := unix.Write(c.fd, []byte("?"))
					testenv.Must(t, err)
					if who, from := c.receive(t); from != vip || who != tr.Backend {
						t.Errorf("%s answers, as %s", who, from)
					}
					unconnected(t, b, s.v6, s.vip, s.others)
				}
			})
		}
	}
	if list, err := b.Translations(); err != nil || len(list) > 0 {
		t.Errorf("all sockets are closed, and there are %v, %v", list, err)
	}
	fates, err := b.Fates()
	testenv.Must(t, err)
	for i, f := range fates {
		if (f.Times == 0) != slices.Contains([]string{"changing", "full", "share", "socket", "kernel"}, f.Name) {
			t.Errorf("%d: %+v", i, f)
		}
	}
}

// refusal checks the error that a process gets from a Service without endpoints.
func refusal() error {
	if features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval) != nil {
		return unix.EPERM
	}
	return unix.ECONNREFUSED
}

// unconnected sends from one socket to two Services in turn.
func unconnected(t *testing.T, b *balancer, v6 bool, vips ...string) {
	t.Helper()
	c := newSocket(t, v6, service.UDP)
	defer c.close()
	given := map[netip.AddrPort]netip.AddrPort{}
	for i := range 40 {
		to := at(vips[i%2], 80)
		testenv.Must(t, c.send(to))
		who, from := c.receive(t)
		if from != to {
			t.Errorf("%s answers %s's packet as %s", who, to, from)
		}
		if before, there := given[to]; there && before != who {
			t.Errorf("%s went to %s, and now to %s", to, before, who)
		}
		given[to] = who
	}
	// Another endpoint goes, then the one that it has.
	was := b.plan
	defer func() {
		b.plan = was
		b.set(t)
	}()
	vip := at(vips[0], 80)
	for _, own := range []bool{false, true} {
		b.plan.Frontends = slices.Clone(b.plan.Frontends)
		for i, f := range b.plan.Frontends {
			if f.Addr == vip.Addr() && f.Port == vip.Port() && f.Protocol == service.UDP {
				ends := slices.Clone(f.Inside.Endpoints)
				j := slices.IndexFunc(ends, func(e netip.AddrPort) bool { return (e == given[vip]) == own })
				f.Inside.Endpoints = slices.Delete(ends, j, j+1)
				testenv.Must(t, b.Change([]service.Change{{Service: f.Service, Old: []service.Frontend{b.plan.Frontends[i]}, New: []service.Frontend{f}}}))
				b.plan.Frontends[i] = f
			}
		}
		for range 10 {
			testenv.Must(t, c.send(vip))
			if who, from := c.receive(t); (who == given[vip]) == own || from != vip {
				t.Errorf("its own endpoint is gone: %v; %s, which has had %s, answers as %s", own, who, given[vip], from)
			}
		}
	}
}

// TestNodePorts reaches node ports from the node and from a pod.
func TestNodePorts(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	pod := local(t)
	ends := []string{"10.0.0.1:8080", "10.0.0.2:8080"}
	for _, e := range ends {
		answer(t, addrPort(e))
		testenv.Must(t, pod.Do(func() error { answer(t, addrPort(e)); return nil }))
	}
	answer(t, addrPort("[fd01::1]:8080"))
	four, six := frontend("0.0.0.0:30080/TCP", ends...), frontend("[::]:30080/TCP", "[fd01::1]:8080")
	// An external IP of another Service that is also a node's address, and one with permitted sources.
	external, some := frontend("192.0.2.1:30081/TCP", ends[0]), frontend("192.0.2.1:30082/TCP", ends[0])
	some.Sources = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
	four.Kind, six.Kind, external.Kind, some.Kind = service.NodePort, service.NodePort, service.ExternalIP, service.ExternalIP
	all := []service.Frontend{four, six, external, some}
	for _, port := range []uint16{30081, 30082} {
		f := four
		f.Port = port
		f.Inside.Endpoints = []netip.AddrPort{addrPort(ends[1])}
		all = append(all, f)
	}
	b.plan = plan(all...)
	b.plan.NodePortAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	b.set(t)
	for _, tc := range []struct {
		to       string
		v6       bool
		node     bool
		want     error
		endpoint string
		peer     string // if it differs from the destination
	}{
		{"192.0.2.1:30080", false, true, nil, "", ""},
		{"192.0.2.1:30080", false, false, nil, "", ""},
		{"[2001:db8::1]:30080", true, true, nil, "[fd01::1]:8080", ""},
		{"127.0.0.1:30080", false, true, nil, "", ""},
		{"127.9.8.7:30080", true, true, nil, "", ""},
		{"127.0.0.1:30080", false, false, unix.ECONNREFUSED, "", ""},
		{"127.0.0.1:30081", false, true, nil, ends[1], ""},
		{"192.0.2.1:30081", false, true, nil, ends[0], ""},
		{"192.0.2.1:30082", false, true, unix.ENETUNREACH, "", ""},
		{"127.0.0.1:30082", false, true, nil, ends[1], ""},
		{"[::1]:30080", true, true, nil, "[fd01::1]:8080", ""},
		{"[::1]:30080", true, false, unix.ECONNREFUSED, "", ""},
		{"[::]:30080", true, true, nil, "[fd01::1]:8080", "[::1]:30080"},
		{"0.0.0.0:30080", false, true, nil, "", "127.0.0.1:30080"},
		{"0.0.0.0:30080", true, true, nil, "", "127.0.0.1:30080"},
		{"0.0.0.0:30080", false, false, unix.ECONNREFUSED, "", ""},
		{"192.0.2.9:30080", false, true, unix.ENETUNREACH, "", ""},
	} {
		if lo := addrPort(tc.to).Addr(); (lo.IsLoopback() || lo.IsUnspecified()) && tc.want == nil && !hasCookie(t) {
			continue
		}
		try := func() error {
			s := newSocket(t, tc.v6, service.TCP)
			defer s.close()
			err := s.connect(addrPort(tc.to))
			if !errors.Is(err, tc.want) {
				t.Errorf("%+v: %v", tc, err)
			}
			if err == nil && tc.want == nil {
				who, _ := s.receive(t)
				if tc.endpoint != "" && who.String() != tc.endpoint {
					t.Errorf("%+v: %s", tc, who)
				}
				tr, _, _ := b.Translated(s.cookie(t))
				if tr.Backend != who || tr.Frontend.String() != cmp.Or(tc.peer, tc.to) || s.peer(t) != tr.Frontend {
					t.Errorf("%+v: translated %+v", tc, tr)
				}
			}
			return nil
		}
		if tc.node {
			testenv.Must(t, try())
		} else {
			testenv.Must(t, pod.Do(try))
		}
	}
}

// TestNodePortsByUDP reaches node ports at loopback addresses. Datagrams go to the node port at the node's own address, where
// rules for packets balance; a server at that address stands for them here.
func TestNodePortsByUDP(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	if !hasCookie(t) {
		t.Skip("needs Linux 5.14")
	}
	own := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	four, six := frontend("0.0.0.0:30080/UDP", "10.0.0.1:8080"), frontend("[::]:30080/UDP", "[fd01::1]:8080")
	four.Kind, six.Kind, four.Affinity = service.NodePort, service.NodePort, time.Hour
	answer(t, addrPort("10.0.0.1:8080"))
	for _, a := range own {
		addLocal(t, a)
		answer(t, netip.AddrPortFrom(a, 30080))
	}
	for _, with := range []bool{true, false} {
		b.plan = plan(four, six)
		if with {
			b.plan.NodePortAddrs = own
		}
		b.set(t)
		for _, tc := range []struct {
			to   string
			v6   bool
			want string
		}{
			{"127.0.0.1:30080", false, "192.0.2.1:30080"},
			{"127.9.8.7:30080", true, "192.0.2.1:30080"},
			{"[::1]:30080", true, "[2001:db8::1]:30080"},
		} {
			to, want := addrPort(tc.to), addrPort(tc.want)
			switch {
			case with:
			case to.Addr().Is6():
				continue // nobody listens there
			default: // node ports answer at loopback addresses only
				want = addrPort("10.0.0.1:8080")
			}
			connected, other := newSocket(t, tc.v6, service.UDP), newSocket(t, tc.v6, service.UDP)
			testenv.Must(t, connected.connect(to))
			for range 3 {
				_, err := unix.Write(connected.fd, []byte("?"))
				testenv.Must(t, err)
				testenv.Must(t, other.send(to))
				for _, s := range []socket{connected, other} {
					if who, from := s.receive(t); who != want || from != to {
						t.Errorf("%s: %s answers, as %s; want %s", to, who, from, want)
					}
				}
			}
			if got := connected.peer(t); got != to {
				t.Errorf("the peer is %s, want %s", got, to)
			}
			connected.close()
			other.close()
		}
	}
}

// TestExternalIPsForPods: a pod's sockets reach the Service, and the node's own sockets reach the host that has the address.
func TestExternalIPsForPods(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	pod := local(t)
	const address, end = "192.0.2.7:80", "10.0.0.1:8080"
	answer(t, addrPort(end))
	testenv.Must(t, pod.Do(func() error { answer(t, addrPort(end)); return nil }))
	f := frontend(address+"/TCP", end)
	f.Kind, f.PodsOnly = service.ExternalIP, true
	u := frontend(address+"/UDP", end)
	u.Kind, u.PodsOnly = service.ExternalIP, true
	b.plan = plan(f, u)
	b.set(t)
	met := func(protocol service.Protocol) bool {
		s := newSocket(t, false, protocol)
		defer s.close()
		if protocol == service.UDP && s.send(addrPort(address)) != nil {
			return false
		}
		if protocol == service.TCP && s.connect(addrPort(address)) != nil {
			return false
		}
		who, _ := s.receive(t)
		return who == addrPort(end)
	}
	for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
		if met(protocol) {
			t.Errorf("%s: the node itself meets a Service that is for pods only", protocol)
		}
		testenv.Must(t, pod.Do(func() error {
			if !met(protocol) && hasCookie(t) {
				t.Errorf("%s: a pod does not meet it", protocol)
			}
			return nil
		}))
	}
	// A change applies to the next socket.
	before := []service.Frontend{f, u}
	f.PodsOnly, u.PodsOnly = false, false
	testenv.Must(t, b.Change([]service.Change{{Service: f.Service, Old: before, New: []service.Frontend{f, u}}}))
	b.plan = plan(f, u)
	for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
		if !met(protocol) {
			t.Errorf("%s: the node does not meet a Service that is for all", protocol)
		}
	}
}

// hasCookie says whether the kernel has cookies of network namespaces, by which programs tell the node from pods.
func hasCookie(t *testing.T) bool {
	t.Helper()
	s := newSocket(t, false, service.UDP)
	defer s.close()
	_, err := unix.GetsockoptUint64(s.fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	return err == nil
}

// TestAffinity: a client keeps its endpoint at every port of the Service.
func TestAffinity(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	pod := local(t)
	var web, dns []string
	for i := range 8 {
		web, dns = append(web, fmt.Sprintf("10.0.0.%d:8080", i+1)), append(dns, fmt.Sprintf("10.0.0.%d:5353", i+1))
		for _, e := range []string{web[i], dns[i]} {
			answer(t, addrPort(e))
			testenv.Must(t, pod.Do(func() error { answer(t, addrPort(e)); return nil }))
		}
	}
	with := func(skip netip.Addr) service.Plan {
		all := []service.Frontend{frontend("172.16.0.1:80/TCP", web...), frontend("172.16.0.1:53/UDP", dns...)}
		for i := range all {
			all[i].Affinity = 3 * time.Hour
			all[i].Inside.Endpoints = slices.DeleteFunc(all[i].Inside.Endpoints, func(e netip.AddrPort) bool { return e.Addr() == skip })
		}
		return plan(all...)
	}
	vip, resolver := addrPort("172.16.0.1:80"), addrPort("172.16.0.1:53")
	favourite := func() netip.Addr {
		t.Helper()
		first := reach(t, false, service.TCP, vip).Addr()
		for i := range 10 {
			if got := reach(t, i%2 == 0, service.TCP, vip).Addr(); got != first {
				t.Errorf("a connection went to %s, and the next one to %s", first, got)
			}
			if got := reach(t, false, service.UDP, resolver).Addr(); got != first {
				t.Errorf("a connection went to %s, and one to another port to %s", first, got)
			}
			s := newSocket(t, false, service.UDP)
			testenv.Must(t, s.send(resolver))
			if got, _ := s.receive(t); got.Addr() != first {
				t.Errorf("a connection went to %s, and a packet to %s", first, got)
			}
			s.close()
		}
		return first
	}
	b.plan = with(netip.Addr{})
	b.set(t)
	first := favourite()
	var pods netip.Addr
	testenv.Must(t, pod.Do(func() error { pods = favourite(); return nil }))
	b.plan = with(first)
	b.set(t)
	second := favourite()
	if second == first {
		t.Errorf("%s is gone, and has connections", first)
	}
	if pods != first {
		testenv.Must(t, pod.Do(func() error {
			if got := favourite(); got != pods {
				t.Errorf("%s is gone, and who has had %s has %s", first, pods, got)
			}
			return nil
		}))
	}
	b.plan = with(netip.Addr{})
	b.set(t)
	if third := favourite(); third != second {
		t.Errorf("%s is back, and who has had %s has %s", first, second, third)
	}

	// The affinity expires: the entry's time is set to the machine's start, which is more than a second ago.
	for i := range b.plan.Frontends {
		b.plan.Frontends[i].Affinity = time.Second
	}
	b.set(t)
	m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, pin.Affinity), nil)
	testenv.Must(t, err)
	defer m.Close()
	met := map[netip.Addr]bool{}
	for range 60 {
		var key [16]byte
		var value [32]byte
		for i := m.Iterate(); i.Next(&key, &value); {
			clear(value[:8])
			testenv.Must(t, m.Update(key, value, ebpf.UpdateExist))
		}
		met[reach(t, false, service.TCP, vip).Addr()] = true
	}
	if len(met) < 4 {
		t.Errorf("after its time a client has only %v", met)
	}
}

// TestAffinityAtOneAddress: if a Service has two endpoints at one address, clients keep theirs, and both endpoints get clients.
func TestAffinityAtOneAddress(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	web, dns := []string{"10.0.0.1:8080", "10.0.0.1:8081", "10.0.0.2:8080"}, []string{"10.0.0.1:5353", "10.0.0.2:5353"}
	for _, e := range slices.Concat(web, dns) {
		answer(t, addrPort(e))
	}
	b.plan = plan(frontend("172.16.0.1:80/TCP", web...), frontend("172.16.0.1:53/UDP", dns...))
	for i := range b.plan.Frontends {
		b.plan.Frontends[i].Affinity = 3 * time.Hour
	}
	b.set(t)
	m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, pin.Affinity), nil)
	testenv.Must(t, err)
	defer m.Close()
	met := map[string]bool{}
	for range 60 { // new clients
		var key [16]byte
		for m.NextKey(nil, &key) == nil {
			testenv.Must(t, m.Delete(key))
		}
		first := reach(t, false, service.TCP, addrPort("172.16.0.1:80"))
		met[first.String()] = true
		for range 3 {
			if got := reach(t, false, service.UDP, addrPort("172.16.0.1:53")); got.Addr() != first.Addr() {
				t.Fatalf("a connection went to %s, and one to another port to %s", first, got)
			}
			if got := reach(t, false, service.TCP, addrPort("172.16.0.1:80")); got != first {
				t.Fatalf("a connection went to %s, and the next one to %s", first, got)
			}
		}
	}
	if len(met) != len(web) {
		t.Errorf("60 clients have met only %v", met)
	}
}

// TestUnsupported: a directory that is not a cgroup v2 is reported.
func TestUnsupported(t *testing.T) {
	_, err := connect.Open(connect.Options{Dir: t.TempDir(), Cgroup: t.TempDir()})
	var unsupported *bpf.UnsupportedError
	if !errors.As(err, &unsupported) {
		t.Errorf("the error is %v", err)
	}
}
