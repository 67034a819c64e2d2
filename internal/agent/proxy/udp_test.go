package proxy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// resolves gives a Service a port that resolvers ask.
func resolves(s *corev1.Service) {
	s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "dns", Protocol: corev1.ProtocolUDP, Port: service.DNSPort})
}

// formerly connects a socket of UDP to an endpoint, as versions did that gave all such sockets one, and notes what it dialled.
func formerly(t *testing.T, paths Paths, dialled, endpoint string) net.Conn {
	t.Helper()
	c := dial(t, "udp", endpoint)
	raw, err := c.(*net.UDPConn).SyscallConn()
	testenv.Must(t, err)
	var cookie uint64
	testenv.Must(t, raw.Control(func(fd uintptr) { cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE) }))
	testenv.Must(t, err)
	entry := func(s string) []byte {
		a := netip.MustParseAddrPort(s)
		addr := a.Addr().As16()
		return binary.BigEndian.AppendUint16(addr[:], a.Port())
	}
	value := slices.Concat(entry(endpoint), []byte{0, 0}, entry(dialled), []byte{byte(service.UDP), 0})
	m, err := ebpf.LoadPinnedMap(filepath.Join(paths.BPF, pin.Peers), nil)
	testenv.Must(t, err)
	defer m.Close()
	testenv.Must(t, m.Put(cookie, value))
	return c
}

// lasting is a socket of UDP that connects once and is then used for as long as there is its program.
type lasting struct {
	name string
	fd   int
	to   netip.AddrPort
}

func newLasting(t *testing.T, name string, family int, to string) *lasting {
	t.Helper()
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	testenv.Must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	testenv.Must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	l := &lasting{name: name, fd: fd}
	l.connect(t, to)
	return l
}

func (l *lasting) connect(t *testing.T, to string) {
	t.Helper()
	l.to = netip.MustParseAddrPort(to)
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: l.to.Addr().As16(), Port: int(l.to.Port())}
	if family, err := unix.GetsockoptInt(l.fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && family == unix.AF_INET {
		sa = &unix.SockaddrInet4{Addr: l.to.Addr().As4(), Port: int(l.to.Port())}
	}
	testenv.Must(t, unix.Connect(l.fd, sa))
}

// ask says who answers, be it the kernel that nobody does.
func (l *lasting) ask() (string, error) {
	if _, err := unix.Write(l.fd, []byte("?")); err != nil {
		return "", err
	}
	b := make([]byte, 64)
	for {
		n, from, err := unix.Recvfrom(l.fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", err
		}
		var seen netip.AddrPort
		switch sa := from.(type) {
		case *unix.SockaddrInet4:
			seen = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			seen = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		}
		if seen != l.to {
			err = fmt.Errorf("the answer of %s is as from %s", b[:n], seen)
		}
		return string(b[:n]), err
	}
}

// TestConnectedUDP has sockets of UDP stay connected to Services while their endpoints come and go: the next packet of each
// goes to an endpoint that is there and ready, whatever was before.
func TestConnectedUDP(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	four, six := []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}, []string{"fd01::1", "fd01::2", "fd01::3"}
	serve(t, four...)
	serve(t, six...)
	n := newNode(t, paths, netconf.ProxyAuto)
	nodePort := func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeNodePort
		s.Spec.Ports[0].NodePort, s.Spec.Ports[1].NodePort = 30080, 30080
	}
	v6 := func(s *corev1.Service) { s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv6Protocol} }
	sticky := func(s *corev1.Service) { s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP }
	services := []*corev1.Service{
		web("web", vip, nodePort), web("six", "fd02::1", nodePort, v6), web("sticky", "172.16.0.3", sticky), web("other", "172.16.0.4", resolves),
	}
	set := func(services ...*corev1.Service) {
		for _, s := range services {
			n.set(s)
		}
	}
	// lead has all Services have some of three endpoints, by their numbers.
	lead := func(how func(i int) string) {
		t.Helper()
		for of, addrs := range map[string][]string{"web": four, "six": six, "sticky": four} {
			var now []string
			for i, a := range addrs {
				if is := how(i); is != "gone" {
					now = append(now, is+a)
				}
			}
			n.set(endpoints(of, now...))
		}
		n.follows(t)
		n.sweep(t)
	}
	only := func(which int, others string) func(int) string {
		return func(i int) string {
			if i == which {
				return ""
			}
			return others
		}
	}
	set(services...)
	n.set(endpoints("other", "10.0.0.3"))
	lead(only(0, "gone"))
	if n.kernel.connect == nil {
		t.Skip(n.kernel.missing)
	}
	sockets := []*lasting{
		newLasting(t, "IPv4", unix.AF_INET, at),
		newLasting(t, "IPv4 by an IPv6 socket", unix.AF_INET6, at),
		newLasting(t, "IPv6", unix.AF_INET6, "[fd02::1]:80"),
		newLasting(t, "affinity", unix.AF_INET, "172.16.0.3:80"),
		newLasting(t, "node port", unix.AF_INET, "10.1.0.1:30080"),
		newLasting(t, "node port at a loopback address", unix.AF_INET, "127.0.0.1:30080"),
		newLasting(t, "node port at a loopback address by an IPv6 socket", unix.AF_INET6, "127.0.0.1:30080"),
		newLasting(t, "node port at a loopback address of IPv6", unix.AF_INET6, "[::1]:30080"),
		newLasting(t, "connects twice", unix.AF_INET, "172.16.0.4:53"),
	}
	twice := sockets[len(sockets)-1]
	if who, err := twice.ask(); err != nil || who != "10.0.0.3" {
		t.Errorf("%s: at first %s answers, %v", twice.name, who, err)
	}
	twice.connect(t, at)
	expect := func(when string, which int) {
		t.Helper()
		for _, s := range sockets {
			want := four[which]
			if s.to.Addr() == netip.IPv6Loopback() || s.to.Addr() == netip.MustParseAddr("fd02::1") {
				want = six[which]
			}
			for i := range 2 {
				who, err := s.ask()
				if i == 0 && errors.Is(err, unix.ECONNREFUSED) { // of a packet before
					who, err = s.ask()
				}
				if err != nil || who != want {
					t.Errorf("%s: %s: %q answers, want %s, %v", when, s.name, who, want, err)
				}
			}
		}
	}
	refused := func(when string) {
		t.Helper()
		for _, s := range sockets {
			// What the node itself sends is not even taken by the kernel, and the refusal comes besides.
			if who, err := s.ask(); !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EPERM) {
				t.Errorf("%s: %s: %q answers, %v", when, s.name, who, err)
			}
		}
	}
	expect("at first", 0)
	lead(func(i int) string { return []string{"-", "", "gone"}[i] })
	expect("their endpoint terminates and serves", 0)
	lead(only(1, "!"))
	expect("their endpoint is not ready", 1)
	lead(only(2, "gone"))
	expect("their endpoint is gone", 2)
	lead(func(int) string { return "!" })
	refused("no endpoint is ready")
	lead(only(0, "!"))
	expect("one is ready again", 0)
	lead(func(int) string { return "gone" })
	refused("there is no endpoint")
	lead(only(1, "gone"))
	expect("there is one again", 1)

	// An agent that was away meanwhile.
	n.stop()
	n.set(endpoints("web", four[0]), endpoints("six", six[0]), endpoints("sticky", four[0]))
	n.start(t, paths, netconf.ProxyAuto)
	lead(only(0, "gone"))
	expect("their endpoint went while no agent ran", 0)

	for _, s := range services {
		n.delete(s)
	}
	n.follows(t)
	n.sweep(t)
	s, err := n.State(t.Context())
	testenv.Must(t, err)
	for _, f := range s.Flows {
		if f.Translated {
			t.Errorf("the Services are deleted, and flows lead on: %+v", f)
		}
	}
	set(services...)
	lead(only(2, "gone"))
	expect("the Services are there again", 2)
	if ended := n.counted(t, "fathom_service_flows_ended_total")["socket"]; ended != 0 {
		t.Errorf("%v sockets were ended", ended)
	}
}

// TestConnectedUDPOfPod has a pod's socket stay connected while its endpoint, another pod, is not ready and then gone: its packets
// come by the wire, and all that is on the node answers.
func TestConnectedUDPOfPod(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	self, err := link.Open(link.OwnNetNS)
	testenv.Must(t, err)
	defer self.Close()
	testenv.Must(t, self.Sysctl("ipv4/ip_forward", "1"))
	pod := linktest.Namespace(t)
	testenv.Must(t, podlink.Add(self, pod, podlink.Pod{Device: "eth0", HostDevice: "pod", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, HostMAC: net.HardwareAddr{2, 0, 0, 0, 0, 2},
		MTU: 1500, Alias: "test", Addrs: []netip.Addr{netip.MustParseAddr("10.9.0.1")}}))
	serve(t, "10.0.0.1", "10.0.0.2")
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("web", vip), endpoints("web", "10.0.0.1"))
	n.follows(t)
	var c *lasting
	testenv.Must(t, pod.Do(func() error {
		c = newLasting(t, "pod", unix.AF_INET, at)
		return nil
	}))
	for _, step := range []struct {
		endpoints []string
		who       string
		err       error
	}{
		{[]string{"10.0.0.1"}, "10.0.0.1", nil},
		{[]string{"!10.0.0.1", "10.0.0.2"}, "10.0.0.2", nil},
		{[]string{"10.0.0.1"}, "10.0.0.1", nil},
		{nil, "", unix.ECONNREFUSED},
		{[]string{"10.0.0.2"}, "10.0.0.2", nil},
	} {
		n.set(endpoints("web", step.endpoints...))
		n.follows(t)
		n.sweep(t)
		if who, err := c.ask(); who != step.who || !errors.Is(err, step.err) {
			t.Errorf("endpoints %v: %q answers, %v", step.endpoints, who, err)
		}
	}
}
