package conntrack

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
	"golang.org/x/sys/unix"
)

// space is a namespace that the test takes away, and what it is opened by.
type space struct {
	*link.Namespace
	path string
}

func newSpace(t testing.TB) space {
	t.Helper()
	n, path := linktest.NamespaceAt(t)
	testenv.Must(t, n.SetUp("lo", true))
	return space{n, path}
}

// addrs gives lo its addresses, and waits until those of IPv6 are met there: the kernel leaves these routes to a worker.
func (n space) addrs(t testing.TB, addrs ...string) {
	t.Helper()
	all := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8"), netip.MustParsePrefix("::1/128")}
	missing := map[string]bool{}
	for _, s := range addrs {
		addr := netip.MustParseAddr(s)
		all = append(all, netip.PrefixFrom(addr, addr.BitLen()))
		if addr.Is6() {
			missing[hex.EncodeToString(addr.AsSlice())] = true
		}
	}
	testenv.Must(t, n.SetAddrs("lo", all))
	for len(missing) > 0 {
		var routes []byte
		testenv.Must(t, n.Do(func() (err error) {
			routes, err = os.ReadFile("/proc/thread-self/net/ipv6_route")
			return err
		}))
		for line := range strings.Lines(string(routes)) {
			const to, flags = 0, 8
			fields := strings.Fields(line)
			bits, err := strconv.ParseUint(fields[flags], 16, 32)
			testenv.Must(t, err)
			if bits&unix.RTF_LOCAL != 0 {
				delete(missing, fields[to])
			}
		}
	}
}

func (n space) conntrack(t testing.TB) *Table {
	t.Helper()
	c, err := OpenTable(n.path)
	testenv.Must(t, err)
	t.Cleanup(c.Close)
	return c
}

func (n space) nft(t testing.TB, rules string) {
	t.Helper()
	var out strings.Builder
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(rules), &out, &out
	err := n.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, out.String(), rules)
	}
}

// socket makes a socket in the namespace. A receive from it ends after some seconds: the test has failed then.
func (n space) socket(t testing.TB, family, kind int) int {
	t.Helper()
	fd := -1
	testenv.Must(t, n.Do(func() error {
		var err error
		fd, err = unix.Socket(family, kind|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(fd) })
	testenv.Must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 20}))
	return fd
}

func sockaddr(a netip.AddrPort) (family int, sa unix.Sockaddr) {
	if a.Addr().Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// bound is a socket at an address, which listens if it can.
func (n space) bound(t testing.TB, kind int, at netip.AddrPort) int {
	t.Helper()
	family, sa := sockaddr(at)
	fd := n.socket(t, family, kind)
	testenv.Must(t, unix.Bind(fd, sa))
	if kind == unix.SOCK_STREAM {
		testenv.Must(t, unix.Listen(fd, 16))
	}
	return fd
}

// connected is a socket that is connected to an address.
func (n space) connected(t testing.TB, kind int, to netip.AddrPort) int {
	t.Helper()
	family, sa := sockaddr(to)
	fd := n.socket(t, family, kind)
	testenv.Must(t, unix.Connect(fd, sa))
	return fd
}

// ask sends a datagram, which server shall receive, and has it answered.
func ask(t testing.TB, client, server int) {
	t.Helper()
	_, err := unix.Write(client, []byte("ask"))
	testenv.Must(t, err)
	buf := make([]byte, 16)
	_, from, err := unix.Recvfrom(server, buf, 0)
	if err != nil {
		t.Fatalf("the datagram does not come: %v", err)
	}
	testenv.Must(t, unix.Sendto(server, []byte("answer"), 0, from))
	if _, err := unix.Read(client, buf); err != nil {
		t.Fatalf("the answer does not come: %v", err)
	}
}

func local(t testing.TB, fd int) netip.AddrPort {
	t.Helper()
	sa, err := unix.Getsockname(fd)
	testenv.Must(t, err)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	t.Fatalf("a socket of %T", sa)
	return netip.AddrPort{}
}

func at(addr string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
}

// insert puts entries into the kernel that no packet has made: to is where the client sends, endpoint, if there is one,
// where it is translated to.
func insert(t testing.TB, c *Table, entries []inserted) {
	t.Helper()
	var pending []nlmsg.Request
	for i, e := range entries {
		family := uint8(unix.AF_INET6)
		if e.to.Addr().Is4() {
			family = unix.AF_INET
		}
		r := nlmsg.New(unix.NFNL_SUBSYS_CTNETLINK<<8, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nfgenmsg(family))
		r = appendTuple(r, ctaTupleOrig, e.protocol, Tuple{Source: e.client, Destination: e.to})
		r = appendTuple(r, ctaTupleReply, e.protocol, Tuple{Source: e.to, Destination: e.client})
		r = r.Attr(ctaTimeout, binary.BigEndian.AppendUint32(nil, 300))
		if e.zone != 0 {
			r = r.Attr(ctaZone, binary.BigEndian.AppendUint16(nil, e.zone))
		}
		if e.endpoint.IsValid() {
			const ctaNATDestination, ipv4From, ipv4To, ports, ipv6From, ipv6To, portFrom, portTo = 13, 1, 2, 3, 4, 5, 1, 2
			r = r.Nest(ctaNATDestination, func(r nlmsg.Request) nlmsg.Request {
				from, to, addr := uint16(ipv6From), uint16(ipv6To), e.endpoint.Addr().AsSlice()
				if e.endpoint.Addr().Is4() {
					from, to = ipv4From, ipv4To
				}
				port := binary.BigEndian.AppendUint16(nil, e.endpoint.Port())
				return r.Attr(from, addr).Attr(to, addr).Nest(ports, func(r nlmsg.Request) nlmsg.Request { return r.Attr(portFrom, port).Attr(portTo, port) })
			})
		}
		if pending = append(pending, r); len(pending) < batch && i+1 < len(entries) {
			continue
		}
		answers, err := c.end.execute(pending)
		testenv.Must(t, err)
		for _, err := range answers {
			testenv.Must(t, err)
		}
		pending = nil
	}
}

type inserted struct {
	protocol             service.Protocol
	client, to, endpoint netip.AddrPort
	zone                 uint16
}

// entries are those that a filter lets through, by what they print.
func entries(t testing.TB, c *Table, f Filter) map[string]Entry {
	t.Helper()
	all := map[string]Entry{}
	testenv.Must(t, c.Entries(context.Background(), f, func(e Entry) error {
		key := e.String()
		if e.Original.Zone != 0 {
			key += fmt.Sprint(" in zone ", e.Original.Zone)
		}
		all[key] = e
		return nil
	}))
	return all
}
