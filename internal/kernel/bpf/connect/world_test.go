package connect_test

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// balancer is a node that balances at connect(): this process, once it runs in a cgroup and a network namespace of its
// own. There all of 10.0.0.0/8 and fd01::/16 is local, so that any of their addresses can be an endpoint's.
type balancer struct {
	*connect.Translator
	opts connect.Options
	plan service.Plan
}

// inside runs the test once more, in a process in such surroundings, and gives that one what it needs. In the first
// process it returns nil, after the second one has ended.
func inside(t testing.TB) *balancer {
	t.Helper()
	s, ok := linktest.Inside(t, makeLocal)
	if !ok {
		return nil
	}
	b := &balancer{opts: connect.Options{Dir: filepath.Join(s.BPFFS, "services"), Cgroup: s.Cgroup}}
	b.open(t)
	return b
}

// local is a namespace to which the endpoints' addresses are local.
func local(t testing.TB) *link.Namespace {
	t.Helper()
	n := linktest.Namespace(t)
	makeLocal(t, n)
	return n
}

// makeLocal makes the endpoints' addresses local to a namespace.
func makeLocal(t testing.TB, n *link.Namespace) {
	t.Helper()
	testenv.Must(t, n.SetUp("lo", true))
	linktest.Run(t, n, "ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo")
	linktest.Run(t, n, "ip", "-6", "route", "add", "local", "fd01::/16", "dev", "lo")
	testenv.Must(t, n.Sysctl("ipv6/ip_nonlocal_bind", "1"))
}

func (b *balancer) open(t testing.TB) {
	t.Helper()
	var err error
	b.Translator, err = connect.Open(b.opts)
	var unsupported *bpf.UnsupportedError
	if errors.As(err, &unsupported) {
		t.Skip(err)
	}
	testenv.Must(t, err)
	t.Cleanup(b.Close)
}

// set sets the plan, and has the kernel agree with it.
func (b *balancer) set(t testing.TB) int {
	t.Helper()
	n, err := b.Set(b.plan)
	testenv.Must(t, err)
	b.check(t)
	return n
}

func (b *balancer) check(t testing.TB) {
	t.Helper()
	if d, err := b.Check(b.plan); err != nil || len(d) > 0 {
		t.Fatalf("%v %v", d, err)
	}
	if n, err := b.Set(b.plan); err != nil || n > 0 {
		t.Fatalf("another Set changes %d, %v", n, err)
	}
}

// addLocal gives the loopback device an address, and waits until packets reach it: of an IPv6 one the kernel adds the local
// route after it has answered (addrconf_dad_work of net/ipv6/addrconf.c), on devices without duplicate detection, too.
func addLocal(t testing.TB, a netip.Addr) {
	t.Helper()
	if out, err := exec.Command("ip", "address", "replace", netip.PrefixFrom(a, a.BitLen()).String(), "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	family := "-4"
	if a.Is6() {
		family = "-6"
	}
	testenv.Eventually(t, a.String()+" is local", func() (bool, string) {
		out, err := exec.Command("ip", family, "route", "show", "table", "local", "exact", a.String()).CombinedOutput()
		return err == nil && strings.Contains(string(out), a.String()), string(out)
	})
}

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// frontend makes one of a key such as "172.16.0.1:80/TCP" and its endpoints; the address names the Service.
func frontend(key string, endpoints ...string) service.Frontend {
	at, protocol, _ := strings.Cut(key, "/")
	a := addrPort(at)
	f := service.Frontend{Key: service.Key{Addr: a.Addr(), Port: a.Port(), Protocol: service.TCP}, Service: service.Name{Namespace: "x", Name: a.Addr().String()}}
	if protocol == "UDP" {
		f.Protocol = service.UDP
	}
	for _, e := range endpoints {
		f.Inside.Endpoints = append(f.Inside.Endpoints, addrPort(e))
	}
	return f
}

// answer has an address answer everybody with the address.
func answer(t testing.TB, at netip.AddrPort) {
	t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	testenv.Must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte(at.String()))
			c.Close()
		}
	}()
	u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	testenv.Must(t, err)
	t.Cleanup(func() { u.Close() })
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			_, _ = u.WriteToUDPAddrPort([]byte(at.String()), from)
		}
	}()
}

// socket is one without Go's runtime, which would make an IPv4 socket of what is to be an IPv6 one.
type socket struct {
	fd       int
	v6       bool
	protocol service.Protocol
}

func newSocket(t testing.TB, v6 bool, p service.Protocol) socket {
	t.Helper()
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if v6 {
		family = unix.AF_INET6
	}
	if p == service.UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
	testenv.Must(t, err)
	testenv.Must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}))
	return socket{fd, v6, p}
}

func (s socket) close() { unix.Close(s.fd) }

func (s socket) sockaddr(a netip.AddrPort) unix.Sockaddr {
	if s.v6 {
		return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

func fromSockaddr(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func (s socket) connect(to netip.AddrPort) error {
	for {
		if err := unix.Connect(s.fd, s.sockaddr(to)); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (s socket) send(to netip.AddrPort) error {
	return unix.Sendto(s.fd, []byte("?"), 0, s.sockaddr(to))
}

// receive returns who answered in truth, and who seems to have.
func (s socket) receive(t testing.TB) (netip.AddrPort, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 64)
	for {
		n, from, err := unix.Recvfrom(s.fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		testenv.Must(t, err)
		return addrPort(string(b[:n])), fromSockaddr(from)
	}
}

func (s socket) peer(t testing.TB) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getpeername(s.fd)
	testenv.Must(t, err)
	return fromSockaddr(sa)
}

func (s socket) cookie(t testing.TB) uint64 {
	t.Helper()
	n, err := unix.GetsockoptUint64(s.fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	testenv.Must(t, err)
	return n
}

// reach says which endpoint a new connection meets.
func reach(t testing.TB, v6 bool, p service.Protocol, to netip.AddrPort) netip.AddrPort {
	t.Helper()
	s := newSocket(t, v6, p)
	defer s.close()
	testenv.Must(t, s.connect(to))
	if p == service.UDP {
		_, err := unix.Write(s.fd, []byte("?"))
		testenv.Must(t, err)
	}
	who, _ := s.receive(t)
	return who
}
