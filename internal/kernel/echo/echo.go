// Package echo sends test packets between network namespaces of different machines: UDP datagrams of chosen sizes,
// to listeners that answer with the address that they saw.
package echo

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
)

const (
	// magic begins each datagram, so that others' are not answered.
	magic = "fathom-probe/1 "
	// attempts and patience are for the first packet of a way, on which neighbours are still asked for.
	attempts = 3
	patience = 700 * time.Millisecond
	// sendersAtOnce bounds the sources that send at the same time.
	sendersAtOnce = 32
	maxDatagram   = 1 << 16
)

// headers is what IP and UDP take of a packet.
func headers(a netip.Addr) int {
	if a.Is4() {
		return 20 + 8
	}
	return 40 + 8
}

// Listener answers probes in one namespace.
type Listener struct {
	Port uint16
	fds  []int
	done sync.WaitGroup
}

// Listen answers probes of both families until Close, on a port that it chooses.
func Listen(n *link.Namespace) (*Listener, error) {
	l := &Listener{}
	err := n.Do(func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue
			}
			if err != nil {
				return fmt.Errorf("open a socket: %w", err)
			}
			l.fds = append(l.fds, fd)
			var at unix.Sockaddr = &unix.SockaddrInet4{Port: int(l.Port)}
			if family == unix.AF_INET6 {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
					return err
				}
				at = &unix.SockaddrInet6{Port: int(l.Port)}
			}
			if err := unix.Bind(fd, at); err != nil {
				return fmt.Errorf("listen for probes: %w", err)
			}
			bound, err := unix.Getsockname(fd)
			if err != nil {
				return err
			}
			l.Port = addrPort(bound).Port()
			// An answer as large as the question is cut up if it must be.
			if err := discover(fd, family, unix.IP_PMTUDISC_DONT); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		l.Close()
		return nil, err
	}
	for _, fd := range l.fds {
		l.done.Add(1)
		go l.answer(fd)
	}
	return l, nil
}

// answer sends each datagram back, with its source in front, in the same length.
func (l *Listener) answer(fd int) {
	defer l.done.Done()
	buffer := make([]byte, maxDatagram)
	for {
		n, from, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 && from == nil { // closed
			return
		}
		if n < len(magic) || string(buffer[:len(magic)]) != magic {
			continue
		}
		reply := make([]byte, n)
		copy(reply, buffer[:n])
		// The number that tells attempts apart stays where it is.
		seen := " " + addrPort(from).Addr().String() + " "
		if at := len(magic) + numberLen; n >= at+len(seen) {
			copy(reply[at:], seen)
		}
		_ = unix.Sendto(fd, reply, 0, from)
	}
}

// Close ends the listener.
func (l *Listener) Close() {
	for _, fd := range l.fds {
		_ = unix.Shutdown(fd, unix.SHUT_RDWR) // wakes up who waits in it
	}
	l.done.Wait()
	for _, fd := range l.fds {
		_ = unix.Close(fd)
	}
	l.fds = nil
}

// discover sets what the kernel does about packets that are too large for the way.
func discover(fd, family, mode int) error {
	if family == unix.AF_INET {
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, mode))
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, mode))
}

func addrPort(a unix.Sockaddr) netip.AddrPort {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}
