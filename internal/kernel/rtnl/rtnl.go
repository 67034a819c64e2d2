// Package rtnl is route netlink for the packages that make devices, addresses and routes: what the netlink library does not
// do, or does slowly with a thousand nodes, and what its callers all need beside it.
package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// Conn is a route netlink socket that takes many requests in one system call, and dumps that the kernel filters.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// Requests without an acknowledgement each: the kernel queues one for every request before we read the first, and
// the queue is short. It always tells of errors.
const (
	batchBytes   = 64 << 10
	receiveBytes = 4 << 20
)

// receiveBuffers are as large as the kernel makes the datagrams of a dump, or larger.
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
		// Without strict checking, since Linux 4.20, the kernel would ignore what filters a dump.
		err = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
	}
	if err == nil {
		err = unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	}
	if err == nil {
		// Room for many errors at once. Without the right to more, the batches' are few all the same.
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBytes)
		return c, nil
	}
	c.Close()
	return nil, fmt.Errorf("open a route netlink socket: %w", err)
}

// Close closes the socket.
func (c *Conn) Close() {
	unix.Close(c.fd)
	receiveBuffers.Put(c.buf) //nolint:staticcheck // a slice's header is nothing beside what it spares
	c.buf = nil
}

// Request is a netlink message, without its sequence number.
type Request []byte

// Kind is the kind of message, such as RTM_NEWROUTE.
func (r Request) Kind() uint16 { return binary.NativeEndian.Uint16(r[4:]) }

// New begins a message of a kind; body is the fixed part that the kind has.
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

// Uint32 appends an attribute that is a number.
func (r Request) Uint32(kind uint16, v uint32) Request {
	return r.Attr(kind, binary.NativeEndian.AppendUint32(nil, v))
}

// Execute does all requests, in their order. failed is called for each that the kernel refuses; the others are
// done all the same.
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
					return // the answer to something that was given up
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

// Dump calls each with the body of every message of a dump. A dump that a change interrupted is begun again: each
// sees true first, for what it has kept to be dropped.
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

// receive waits for one datagram and calls each for the messages in it.
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

// messages calls each for the messages of a datagram.
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

// Attrs calls each for the attributes of a message.
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
