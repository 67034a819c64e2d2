// Package rtnl is route netlink for the packages that make devices, addresses and routes. It does what the netlink library
// cannot do, or does slowly with a thousand nodes, and holds conversions that its callers share.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a route netlink socket. It sends many requests in one system call, and its dumps are filtered by the kernel.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Requests do not ask for acknowledgements: the kernel queues one per request before the first is read, and the queue is
// short. Errors are always reported.
const (
	batchBytes   = 64 << 10
	receiveBytes = 4 << 20
)

// receiveBuffers hold buffers at least as large as the datagrams of a dump.
var receiveBuffers = sync.Pool{New: func() any { return make([]byte, 256<<10) }}

// Open opens a socket in the network namespace of the calling thread.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a route netlink socket: %w", err)
	}
	c := &Conn{fd: fd, buf: receiveBuffers.Get().([]byte)}
	err = unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		// Without strict checking (Linux 4.20) the kernel ignores the filter of a dump.
		err = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	}
	if err == nil {
		err = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	}
	if err == nil {
		// Room for many errors at once. Without the privilege for more, the default suffices for the few that batches
		// cause.
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBytes)
		return c, nil
	}
	c.Close()
	return nil, fmt.Errorf("open a route netlink socket: %w", err)
}

// Close closes the socket.
func (c *Conn) Close() {
	unix.Close(c.fd)
	receiveBuffers.Put(c.buf) //nolint:staticcheck // the slice header's allocation is negligible
	c.buf = nil
}

// Request is a netlink message, without its sequence number.
type Request []byte

// Kind returns the kind of message, such as RTM_NEWROUTE.
func (r Request) Kind() uint16 { return binary.NativeEndian.Uint16(r[4:]) }

// New starts a message of a kind; body is the fixed part of that kind.
func New(kind, flags uint16, body []byte) Request {
	r := make(Request, unix.NLMSG_HDRLEN, 128)
	binary.NativeEndian.PutUint16(r[4:], kind)
	binary.NativeEndian.PutUint16(r[6:], flags|unix.NLM_F_REQUEST)
	return append(r, body...)
}

// Attr appends an attribute.
func (r Request) Attr(kind uint16, data []byte) Request {
	r = binary.NativeEndian.AppendUint16(r, uint16(unix.SizeofRtAttr+len(data)))
	r = binary.NativeEndian.AppendUint16(r, kind)
	r = append(r, data...)
	for len(r)%unix.NLMSG_ALIGNTO != 0 {
		r = append(r, 0)
	}
	return r
}

// Uint32 appends an attribute with a number in host byte order.
func (r Request) Uint32(kind uint16, v uint32) Request {
	return r.Attr(kind, binary.NativeEndian.AppendUint32(nil, v))
}

// Execute sends all requests in order. It calls failed for each that the kernel rejects; the others are carried out all the
// same.
func (c *Conn) Execute(requests []Request, failed func(i int, err error)) error {
	for done := 0; done < len(requests); {
		first, last := c.seq+1, done
		var batch []byte
		for ; last < len(requests) && len(batch)+len(requests[last]) <= batchBytes; last++ {
			r := requests[last]
			c.seq++
			binary.NativeEndian.PutUint32(r[0:], uint32(len(r)))
			binary.NativeEndian.PutUint32(r[8:], c.seq)
			if last+1 == len(requests) || len(batch)+len(r)+len(requests[last+1]) > batchBytes {
				binary.NativeEndian.PutUint16(r[6:], binary.NativeEndian.Uint16(r[6:])|unix.NLM_F_ACK)
			}
			batch = append(batch, r...)
		}
		if _, err := unix.Write(c.fd, batch); err != nil {
			return fmt.Errorf("send netlink requests: %w", err)
		}
		for finished := false; !finished; {
			if err := c.receive(func(kind, _ uint16, seq uint32, body []byte) {
				if kind != unix.NLMSG_ERROR || seq < first || seq > c.seq || len(body) < 4 {
					return // the answer to an abandoned request
				}
				if errno := -int32(binary.NativeEndian.Uint32(body)); errno != 0 {
					failed(done+int(seq-first), unix.Errno(errno))
				}
				finished = finished || seq == c.seq
			}); err != nil {
				return err
			}
		}
		done = last
	}
	return nil
}

// Dump calls each with the body of every message of a dump. If a change interrupts the dump, Dump repeats it and calls each
// with restart set first, so that each discards what it has kept.
func (c *Conn) Dump(r Request, each func(restart bool, body []byte)) error {
	for {
		c.seq++
		binary.NativeEndian.PutUint32(r[0:], uint32(len(r)))
		binary.NativeEndian.PutUint16(r[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
		binary.NativeEndian.PutUint32(r[8:], c.seq)
		if _, err := unix.Write(c.fd, r); err != nil {
			return fmt.Errorf("send a netlink dump request: %w", err)
		}
		each(true, nil)
		interrupted := false
		var refused error
		for finished := false; !finished; {
			if err := c.receive(func(kind, flags uint16, seq uint32, body []byte) {
				if seq != c.seq {
					return
				}
				interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
				switch kind {
				case unix.NLMSG_DONE, unix.NLMSG_ERROR:
					finished = true
					if len(body) >= 4 {
						if errno := -int32(binary.NativeEndian.Uint32(body)); errno > 0 {
							refused = unix.Errno(errno)
						}
					}
				default:
					each(false, body)
				}
			}); err != nil {
				return err
			}
		}
		switch {
		case interrupted || errors.Is(refused, unix.EINTR):
		case refused != nil:
			return fmt.Errorf("netlink dump: %w", refused)
		default:
			return nil
		}
	}
}

// receive waits for one datagram and calls each for its messages.
func (c *Conn) receive(each func(kind, flags uint16, seq uint32, body []byte)) error {
	var size int
	for {
		var err error
		if size, _, err = unix.Recvfrom(c.fd, c.buf, 0); err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("receive from netlink: %w", err)
		}
	}
	return messages(c.buf[:size], each)
}

// messages calls each for a datagram's messages.
func messages(rest []byte, each func(kind, flags uint16, seq uint32, body []byte)) error {
	for len(rest) >= unix.NLMSG_HDRLEN {
		length := int(binary.NativeEndian.Uint32(rest))
		if length < unix.NLMSG_HDRLEN || length > len(rest) {
			return errors.New("receive from netlink: a message is cut off")
		}
		each(binary.NativeEndian.Uint16(rest[4:]), binary.NativeEndian.Uint16(rest[6:]),
			binary.NativeEndian.Uint32(rest[8:]), rest[unix.NLMSG_HDRLEN:length])
		rest = rest[min(len(rest), (length+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return nil
}

// Attrs calls each for a message's attributes.
func Attrs(b []byte, each func(kind uint16, data []byte)) {
	for len(b) >= unix.SizeofRtAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofRtAttr || length > len(b) {
			return
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:length])
		b = b[min(len(b), (length+3)&^3):]
	}
}
