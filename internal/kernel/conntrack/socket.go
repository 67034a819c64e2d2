package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"golang.org/x/sys/unix"
)

// Socket is a connected socket of TCP or UDP.
type Socket struct {
	Protocol service.Protocol
	// Local and Remote are as on the wire: IPv4 where a program sees ::ffff:192.0.2.1, and the endpoint where a program has
	// connected to a Service.
	Local, Remote netip.AddrPort
	// Cookie is the kernel's number of the socket, unique on the machine. eBPF programs see the same number.
	Cookie uint64

	family uint8
	id     [sizeofSockID]byte // as the kernel tells it, for it to find the socket again
}

// String returns the socket as people write it, "TCP 10.244.0.5:4711 > 10.244.1.7:80".
func (s Socket) String() string { return fmt.Sprintf("%s %s > %s", s.Protocol, s.Local, s.Remote) }

// Sockets are the sockets in a network namespace. It is for one goroutine at a time. After a netlink error, close it and
// open it again.
type Sockets struct {
	path string
	conn *conn
}

// OpenSockets opens the namespace at path, such as /run/netns/X, a pod's, or /proc/self/ns/net.
func OpenSockets(path string) (*Sockets, error) {
	c, err := dial(path, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sockets: %w", err)
	}
	return &Sockets{path, c}, nil
}

// Close closes what OpenSockets opened, and none of the sockets.
func (s *Sockets) Close() { s.conn.close() }

// IsUnsupported reports whether the error means that the kernel cannot list or destroy sockets, because it was built
// without CONFIG_INET_DIAG, CONFIG_INET_UDP_DIAG or CONFIG_INET_DIAG_DESTROY.
func IsUnsupported(err error) bool { return errors.Is(err, errors.ErrUnsupported) }

// List calls each for every socket of the protocol that is connected to one of remotes, or to anything if remotes is nil.
// If many others come and go, a socket may be missed in one listing, but not in all. An error of each stops it and is
// returned.
func (s *Sockets) List(ctx context.Context, protocol service.Protocol, remotes []netip.AddrPort, each func(Socket) error) error {
	var wanted map[netip.AddrPort]bool
	if remotes != nil {
		wanted = make(map[netip.AddrPort]bool, len(remotes))
		for _, r := range remotes {
			wanted[r] = true
		}
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		r, some := socketsRequest(family, protocol, remotes)
		if !some {
			continue
		}
		err := s.conn.dump(ctx, r, func(body []byte) error {
			socket, err := parseSocket(protocol, body)
			if err != nil {
				return err
			}
			if socket.Remote.Port() == 0 || wanted != nil && !wanted[socket.Remote] {
				return nil
			}
			return each(socket)
		})
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: the kernel has no sock_diag for it", errors.ErrUnsupported)
		}
		if err != nil {
			return fmt.Errorf("list %s sockets in %s: %w", protocol, s.path, err)
		}
	}
	return nil
}

// Sweep destroys the sockets of the protocol that List would list and stale selects, and returns how many. Their programs
// get ECONNABORTED and reconnect.
func (s *Sockets) Sweep(ctx context.Context, protocol service.Protocol, remotes []netip.AddrPort, stale func(Socket) bool) (destroyed int, err error) {
	// Not during the listing: the kernel continues a list by counting, and would skip some.
	var ends []nlmsg.Request
	err = s.List(ctx, protocol, remotes, func(socket Socket) error {
		if stale(socket) {
			ends = append(ends, destroyRequest(socket))
		}
		return nil
	})
	for len(ends) > 0 && err == nil {
		next := ends[:min(batch, len(ends))]
		ends = ends[len(next):]
		var n int
		n, err = s.destroy(next)
		destroyed += n
	}
	return destroyed, err
}

// Destroy ends the socket, and says whether it was there. No other one is hit. Of several of UDP with the same addresses
// and ports (SO_REUSEPORT) the kernel finds one only, until that has ended.
func (s *Sockets) Destroy(socket Socket) (bool, error) {
	n, err := s.destroy([]nlmsg.Request{destroyRequest(socket)})
	return n == 1, err
}

func (s *Sockets) destroy(requests []nlmsg.Request) (destroyed int, err error) {
	answers, err := s.conn.execute(requests)
	if err != nil {
		return 0, fmt.Errorf("destroy sockets in %s: %w", s.path, err)
	}
	for _, answer := range answers {
		switch {
		case answer == nil:
			destroyed++
		case errors.Is(answer, unix.ENOENT), errors.Is(answer, unix.ESTALE): // it has gone, or another is in its place
		default:
			err = fmt.Errorf("destroy a socket in %s: %w", s.path, answer)
		}
	}
	return destroyed, err
}

// Sizes and numbers from linux/inet_diag.h and, of TCP's states, net/tcp_states.h.
const (
	sizeofSockID  = 48
	sizeofDiagMsg = 4 + sizeofSockID + 20

	// sockID's parts: ports, addresses, the device that it is bound to, the cookie.
	sockIDSource      = 4
	sockIDDestination = 20
	sockIDCookie      = 40

	diagReqBytecode = 1

	bcJump        = 1
	bcDestination = 8
	sizeofBcOp    = 4

	stateEstablished = 1
	stateSynSent     = 2
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateCloseWait   = 8
	stateLastAck     = 9
	stateClosing     = 11

	// Without TIME_WAIT, of which no program knows any more, and without what only listens or has only been asked.
	connectedStates = 1<<stateEstablished | 1<<stateSynSent | 1<<stateFinWait1 | 1<<stateFinWait2 |
		1<<stateCloseWait | 1<<stateLastAck | 1<<stateClosing
)

// diagRequest is the fixed part of sock_diag's messages, inet_diag_req_v2.
func diagRequest(family uint8, protocol service.Protocol, states uint32, id [sizeofSockID]byte) []byte {
	b := []byte{family, uint8(protocol), 0, 0}
	b = binary.NativeEndian.AppendUint32(b, states)
	return append(b, id[:]...)
}

// kernelRemotes is how many remotes the kernel shall look for. It compares them one by one, a map is faster with more.
const kernelRemotes = 64

// socketsRequest asks for the sockets of a family, and says whether there can be any.
func socketsRequest(family uint8, protocol service.Protocol, remotes []netip.AddrPort) (nlmsg.Request, bool) {
	r := nlmsg.New(unix.SOCK_DIAG_BY_FAMILY, 0, diagRequest(family, protocol, connectedStates, [sizeofSockID]byte{}))
	if remotes == nil {
		return r, true
	}
	var conditions [][]byte
	for _, remote := range remotes {
		switch addr := remote.Addr(); {
		case addr.Is4(): // sockets of IPv6 speak IPv4 too
			conditions = append(conditions, condition(unix.AF_INET, remote))
		case addr.IsValid() && family == unix.AF_INET6:
			conditions = append(conditions, condition(unix.AF_INET6, remote))
		}
	}
	if n := len(conditions); n == 0 || n > kernelRemotes {
		return r, n > 0
	}
	return r.Attr(diagReqBytecode, anyOf(conditions)), true
}

// condition is the kernel's byte code for: the remote address and port are these. Where it goes on is added by anyOf.
func condition(family uint8, remote netip.AddrPort) []byte {
	b := []byte{bcDestination, 0, 0, 0, family, uint8(remote.Addr().BitLen()), 0, 0}
	b = binary.NativeEndian.AppendUint32(b, uint32(remote.Port()))
	b = append(b, remote.Addr().AsSlice()...)
	b[1] = uint8(len(b))
	return b
}

// anyOf makes one program of conditions. A condition that holds goes on to the jump behind it, and that to the end,
// which means yes; one that does not goes on behind the jump, or, the last, beyond the end, which means no.
func anyOf(conditions [][]byte) []byte {
	left := sizeofBcOp * (len(conditions) - 1)
	for _, c := range conditions {
		left += len(c)
	}
	var b []byte
	for i, c := range conditions {
		binary.NativeEndian.PutUint16(c[2:], uint16(len(c)+sizeofBcOp))
		b = append(b, c...)
		left -= len(c)
		if i < len(conditions)-1 {
			b = binary.NativeEndian.AppendUint16(append(b, bcJump, sizeofBcOp), uint16(left))
			left -= sizeofBcOp
		}
	}
	return b
}

func destroyRequest(s Socket) nlmsg.Request {
	return nlmsg.New(unix.SOCK_DESTROY, 0, diagRequest(s.family, s.Protocol, 0, s.id))
}

// parseSocket reads an inet_diag_msg.
func parseSocket(protocol service.Protocol, body []byte) (Socket, error) {
	if len(body) < sizeofDiagMsg {
		return Socket{}, errors.New("a message of sock_diag is cut off")
	}
	s := Socket{Protocol: protocol, family: body[0]}
	copy(s.id[:], body[4:])
	addr := func(at int) netip.Addr {
		if s.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(s.id[at:]))
		}
		return netip.AddrFrom16([16]byte(s.id[at:])).Unmap()
	}
	s.Local = netip.AddrPortFrom(addr(sockIDSource), binary.BigEndian.Uint16(s.id[0:]))
	s.Remote = netip.AddrPortFrom(addr(sockIDDestination), binary.BigEndian.Uint16(s.id[2:]))
	// Two halves, the lower one first, each in the machine's order.
	s.Cookie = uint64(binary.NativeEndian.Uint32(s.id[sockIDCookie:])) | uint64(binary.NativeEndian.Uint32(s.id[sockIDCookie+4:]))<<32
	if s.Cookie == math.MaxUint64 { // which in a request means any socket
		return Socket{}, errors.New("a message of sock_diag has no cookie")
	}
	return s, nil
}
