// Package conntrack lists and ends what the kernel remembers of flows: entries of connection tracking, and sockets. Both
// outlive what they lead to: an endpoint that has gone is still where the packets of its flows go.
//
// The messages are made and read here, for want of a library that streams: those for connection tracking that there
// are return a list of all entries, copied twice, and a node has hundreds of thousands.
package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"golang.org/x/sys/unix"
)

// conn is a netlink socket in a network namespace. It is for one goroutine at a time.
type conn struct {
	fd  int
	seq uint32
	buf []byte
}

const (
	// bufferBytes holds any datagram: a dump's are 32 KiB at most.
	bufferBytes = 64 << 10
	// batch is how many requests go out at once. The kernel queues an answer for each that it refuses before we read
	// the first, and those of a full batch fit the smallest queue that is usual.
	batch = 128
	// patience is long for a kernel that answers within the system call. It is there so that a lost answer becomes an
	// error instead of a goroutine that waits for ever.
	patience = 20 * time.Second
	// restarts is how often a dump that changes interrupted is begun again.
	restarts = 20
)

// dial opens a socket in the namespace at path, such as /run/netns/X or /proc/self/ns/net.
func dial(path string, protocol int) (*conn, error) {
	ns, err := link.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	c := &conn{fd: -1, buf: make([]byte, bufferBytes)}
	err = ns.Do(func() error {
		var err error
		c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		return err
	})
	if err == nil {
		err = unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err == nil {
		err = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	}
	if err == nil {
		timeout := unix.NsecToTimeval(patience.Nanoseconds())
		err = unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("open a netlink socket in %s: %w", path, err)
	}
	return c, nil
}

func (c *conn) close() {
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
}

// execute does a batch of requests. It returns what the kernel answered to each: nil, or the error by which it refused.
func (c *conn) execute(requests []request) ([]error, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	first := c.seq + 1
	var out []byte
	for i, r := range requests {
		c.seq++
		flags := uint16(unix.NLM_F_REQUEST)
		if i == len(requests)-1 {
			flags |= unix.NLM_F_ACK // it comes after all others
		}
		out = append(out, r.seal(flags, c.seq)...)
	}
	if _, err := unix.Write(c.fd, out); err != nil {
		return nil, fmt.Errorf("send netlink requests: %w", err)
	}
	answers := make([]error, len(requests))
	for finished := false; !finished; {
		if err := c.receive(func(kind, _ uint16, seq uint32, body []byte) {
			if at := seq - first; kind == unix.NLMSG_ERROR && at < uint32(len(requests)) {
				answers[at] = refusal(body)
				finished = finished || seq == c.seq
			}
		}); err != nil {
			return nil, err
		}
	}
	return answers, nil
}

// dump calls each with the body of every message that answers the request, which is valid until each returns. What a
// change interrupted is begun again, so that each may see a thing twice. Once each has returned an error or ctx has
// ended, the rest is read and forgotten, so that the socket can be used again.
func (c *conn) dump(ctx context.Context, r request, each func(body []byte) error) error {
	return c.ask(ctx, r, unix.NLM_F_DUMP, each)
}

// ask is dump also of what has one answer, and is asked for with NLM_F_ACK.
func (c *conn) ask(ctx context.Context, r request, flags uint16, each func(body []byte) error) error {
	for range restarts {
		c.seq++
		if _, err := unix.Write(c.fd, r.seal(unix.NLM_F_REQUEST|flags, c.seq)); err != nil {
			return fmt.Errorf("send a netlink request: %w", err)
		}
		var stop, refused error
		interrupted := false
		for finished := false; !finished; {
			if stop == nil {
				stop = ctx.Err()
			}
			if err := c.receive(func(kind, flags uint16, seq uint32, body []byte) {
				if seq != c.seq {
					return // the answer to something that was given up
				}
				interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
				switch {
				case kind == unix.NLMSG_DONE || kind == unix.NLMSG_ERROR:
					finished, refused = true, refusal(body)
				case kind >= unix.NLMSG_MIN_TYPE && stop == nil:
					stop = each(body)
				}
			}); err != nil {
				return err
			}
		}
		switch {
		case stop != nil:
			return stop
		case interrupted || errors.Is(refused, unix.EINTR):
		case refused != nil:
			return refused
		default:
			return nil
		}
	}
	return fmt.Errorf("changes interrupted it %d times", restarts)
}

// receive waits for one datagram and calls each for the messages in it.
func (c *conn) receive(each func(kind, flags uint16, seq uint32, body []byte)) error {
	for {
		size, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("receive from netlink: no answer within %s", patience)
		case err != nil:
			return fmt.Errorf("receive from netlink: %w", err)
		default:
			return messages(c.buf[:size], each)
		}
	}
}

// messages calls each for the messages of a datagram.
func messages(b []byte, each func(kind, flags uint16, seq uint32, body []byte)) error {
	for len(b) >= unix.NLMSG_HDRLEN {
		length := uint64(binary.NativeEndian.Uint32(b))
		if length < unix.NLMSG_HDRLEN || length > uint64(len(b)) {
			return errors.New("receive from netlink: a message is cut off")
		}
		each(binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:]), b[unix.NLMSG_HDRLEN:length])
		b = b[min(len(b), aligned(int(length))):]
	}
	return nil
}

// refusal is the error that a message that ends an answer tells of, or nil.
func refusal(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if errno := -int32(binary.NativeEndian.Uint32(body)); errno > 0 {
		return unix.Errno(errno)
	}
	return nil
}

func aligned(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }

// attrs calls each for the attributes in b, without the flags of their kinds, and says whether b is made of attributes
// to its end.
func attrs(b []byte, each func(kind uint16, data []byte)) bool {
	for len(b) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return false
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:length])
		b = b[min(len(b), aligned(length)):]
	}
	return len(b) == 0
}

// request is a netlink message; what seal adds is missing.
type request []byte

// newRequest begins a message of a kind; body is the fixed part that the kind has.
func newRequest(kind uint16, body []byte) request {
	r := make(request, unix.NLMSG_HDRLEN, 192)
	binary.NativeEndian.PutUint16(r[4:], kind)
	return append(r, body...)
}

func (r request) attr(kind uint16, data []byte) request {
	r = binary.NativeEndian.AppendUint16(r, uint16(unix.SizeofNlAttr+len(data)))
	r = binary.NativeEndian.AppendUint16(r, kind)
	r = append(r, data...)
	for len(r)%unix.NLMSG_ALIGNTO != 0 {
		r = append(r, 0)
	}
	return r
}

// nest appends an attribute that inside appends to.
func (r request) nest(kind uint16, inside func(request) request) request {
	at := len(r)
	r = inside(r.attr(kind|unix.NLA_F_NESTED, nil))
	binary.NativeEndian.PutUint16(r[at:], uint16(len(r)-at))
	return r
}

func (r request) seal(flags uint16, seq uint32) request {
	binary.NativeEndian.PutUint32(r[0:], uint32(len(r)))
	binary.NativeEndian.PutUint16(r[6:], flags|binary.NativeEndian.Uint16(r[6:]))
	binary.NativeEndian.PutUint32(r[8:], seq)
	return r
}

// sameFamily says whether the addresses are of one family, and there at all.
func sameFamily(addrs ...netip.Addr) bool {
	for _, a := range addrs {
		if !a.IsValid() || a.Is4() != addrs[0].Is4() {
			return false
		}
	}
	return true
}
