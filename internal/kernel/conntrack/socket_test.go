package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/testenv"
	"golang.org/x/sys/unix"
)

// client is a connected socket, with what answers it.
type client struct {
	name          string
	protocol      service.Protocol
	fd, server    int
	local, remote netip.AddrPort
	end           bool // it is to end
}

// clients are sockets of all kinds, half of which are connected to endpoints that go.
func clients(t *testing.T, n space) (all []client) {
	n.addrs(t, "10.244.0.1", "fd00:244::1")
	kinds := map[service.Protocol]int{service.TCP: unix.SOCK_STREAM, service.UDP: unix.SOCK_DGRAM}
	for protocol, kind := range kinds {
		for _, port := range []uint16{8080, 8081} {
			servers := map[string]int{}
			for _, to := range []string{"10.244.0.1", "fd00:244::1"} {
				servers[to] = n.bound(t, kind, at(to, port))
			}
			for _, dial := range []string{"10.244.0.1", "fd00:244::1", "::ffff:10.244.0.1"} {
				remote := netip.MustParseAddr(dial).Unmap()
				server := servers[remote.String()]
				fd := n.connected(t, kind, at(dial, port))
				if protocol == service.TCP {
					var err error
					server, _, err = unix.Accept4(server, unix.SOCK_CLOEXEC)
					testenv.Must(t, err)
					t.Cleanup(func() { unix.Close(server) })
				}
				all = append(all, client{
					name: fmt.Sprintf("%s to %s, port %d", protocol, dial, port), protocol: protocol,
					fd: fd, server: server, local: local(t, fd), remote: netip.AddrPortFrom(remote, port), end: port == 8080,
				})
			}
		}
	}
	return all
}

// alive asks the socket's server.
func (c client) alive(t *testing.T) {
	t.Helper()
	if c.protocol == service.UDP {
		ask(t, c.fd, c.server)
		return
	}
	buf := make([]byte, 16)
	for _, way := range [][2]int{{c.fd, c.server}, {c.server, c.fd}} {
		if _, err := unix.Write(way[0], []byte("x")); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if _, err := unix.Read(way[1], buf); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
	}
}

// check has those that are to end be aborted, and the others be alive.
func check(t *testing.T, all []client) {
	t.Helper()
	for _, c := range all {
		if !c.end {
			c.alive(t)
			continue
		}
		if _, err := unix.Read(c.fd, make([]byte, 16)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("%s: the program sees %v, want %v", c.name, err, unix.ECONNABORTED)
		}
	}
}

func (n space) sockets(t *testing.T) *Sockets {
	t.Helper()
	s, err := OpenSockets(n.path)
	testenv.Must(t, err)
	t.Cleanup(s.Close)
	return s
}

func TestSocketsSweep(t *testing.T) {
	gone := []netip.AddrPort{at("10.244.0.1", 8080), at("fd00:244::1", 8080), at("10.244.0.1", 9999), at("fd00:244::1", 9999)}
	many := slices.Clone(gone)
	for i := range uint16(2 * kernelRemotes) {
		many = append(many, at("10.244.0.1", 10000+i))
	}
	for name, remotes := range map[string][]netip.AddrPort{"by the kernel": gone, "by a map": many, "all": nil} {
		t.Run(name, func(t *testing.T) {
			n, other := newSpace(t), newSpace(t)
			s, all := n.sockets(t), clients(t, n)
			for _, c := range clients(t, other) { // which has the same addresses
				c.end = false
				all = append(all, c)
			}
			for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
				destroyed, err := s.Sweep(context.Background(), protocol, remotes, func(s Socket) bool { return slices.Contains(gone, s.Remote) })
				if err != nil || destroyed != 3 {
					t.Errorf("%s: destroyed %d, %v, want 3", protocol, destroyed, err)
				}
				destroyed, err = s.Sweep(context.Background(), protocol, remotes, func(s Socket) bool { return slices.Contains(gone, s.Remote) })
				if err != nil || destroyed != 0 {
					t.Errorf("%s: the second time destroyed %d, %v, want 0", protocol, destroyed, err)
				}
			}
			check(t, all)
		})
	}
}

func TestSockets(t *testing.T) {
	n := newSpace(t)
	s, all := n.sockets(t), clients(t, n)
	for i, c := range all {
		var found []Socket
		testenv.Must(t, s.List(context.Background(), c.protocol, []netip.AddrPort{c.remote}, func(s Socket) error {
			if s.Remote != c.remote {
				t.Errorf("%s: lists %s", c.name, s)
			}
			if s.Local == c.local {
				found = append(found, s)
			}
			return nil
		}))
		if len(found) != 1 {
			t.Fatalf("%s: found %v", c.name, found)
		}
		socket := found[0]
		if cookie, err := unix.GetsockoptUint64(c.fd, unix.SOL_SOCKET, unix.SO_COOKIE); err != nil || cookie != socket.Cookie {
			t.Errorf("%s: has the cookie %x, %v, listed is %x", c.name, cookie, err, socket.Cookie)
		}
		newer := socket
		newer.id[sockIDCookie]++
		if done, err := s.Destroy(newer); err != nil || done {
			t.Errorf("%s: one with another cookie is destroyed: %t, %v", c.name, done, err)
		}
		c.alive(t)
		if !c.end {
			continue
		}
		for _, want := range []bool{true, false} {
			if done, err := s.Destroy(socket); err != nil || done != want {
				t.Errorf("%s: destroyed is %t, %v, want %t", c.name, done, err, want)
			}
		}
		check(t, all[i:i+1])
	}
	check(t, slices.DeleteFunc(all, func(c client) bool { return c.end }))
	if err := s.List(context.Background(), service.SCTP+1, nil, func(Socket) error { return nil }); !IsUnsupported(err) {
		t.Errorf("a protocol without sock_diag gives %v", err)
	}
}

// TestSynSent destroys what waits for an endpoint that does not answer.
func TestSynSent(t *testing.T) {
	n := newSpace(t)
	n.addrs(t, "10.244.0.1")
	n.nft(t, `table inet silent {
		chain input { type filter hook input priority 0;
			tcp dport 8080 drop
		}
	}`)
	fd := n.socket(t, unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK)
	_, to := sockaddr(at("10.244.0.1", 8080))
	if err := unix.Connect(fd, to); !errors.Is(err, unix.EINPROGRESS) {
		t.Fatal(err)
	}
	destroyed, err := n.sockets(t).Sweep(context.Background(), service.TCP, []netip.AddrPort{at("10.244.0.1", 8080)}, func(Socket) bool { return true })
	if err != nil || destroyed != 1 {
		t.Errorf("destroyed %d, %v, want 1", destroyed, err)
	}
	if errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || unix.Errno(errno) != unix.ECONNABORTED {
		t.Errorf("the program sees %v, %v, want %v", unix.Errno(errno), err, unix.ECONNABORTED)
	}
}

// TestSocketsFilter has the kernel leave out what is not asked for.
func TestSocketsFilter(t *testing.T) {
	n := newSpace(t)
	s := n.sockets(t)
	clients(t, n)
	for _, c := range []struct {
		family  uint8
		remotes []netip.AddrPort
		want    int
	}{
		{unix.AF_INET, []netip.AddrPort{at("10.244.0.1", 8080)}, 1},
		{unix.AF_INET, []netip.AddrPort{at("10.244.0.1", 8080), at("10.244.0.2", 8081), at("10.244.0.1", 8081)}, 2},
		{unix.AF_INET, []netip.AddrPort{at("fd00:244::1", 8080)}, 0},
		{unix.AF_INET6, []netip.AddrPort{at("fd00:244::1", 8080)}, 1},
		{unix.AF_INET6, []netip.AddrPort{at("10.244.0.1", 8080), at("fd00:244::1", 8081), at("fd00:244::1", 8082)}, 2},
	} {
		got := 0
		if r, some := socketsRequest(c.family, service.UDP, c.remotes); some {
			testenv.Must(t, s.conn.dump(context.Background(), r, func([]byte) error { got++; return nil }))
		}
		if got != c.want {
			t.Errorf("family %d to %s: the kernel tells of %d sockets, want %d", c.family, c.remotes, got, c.want)
		}
	}
}
