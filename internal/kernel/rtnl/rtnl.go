// Package rtnl is route netlink for the packages that make devices, addresses and routes. It does what the netlink library
// cannot do, or does slowly with a thousand nodes, and holds conversions that its callers share.
package rtnl

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
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

// Execute sends all requests in order. It calls failed for each that the kernel rejects; the others are carried out all the
// same.
func (c *Conn) Execute(requests []nlmsg.Request, failed func(i int, err error)) error {
	for done := 0; done < len(requests); {
		first, last := c.seq+1, done
		var batch []byte
		for ; last < len(requests) && len(batch)+len(requests[last]) <= batchBytes; last++ {
			r := requests[last]
			c.seq++
			var flags uint16
			if last+1 == len(requests) || len(batch)+len(r)+len(requests[last+1]) > batchBytes {
				flags = unix.NLM_F_ACK
			}
			batch = append(batch, r.Seal(flags, c.seq)...)
		}
		if _, err := unix.Write(c.fd, batch); err != nil {
			return fmt.Errorf("send netlink requests: %w", err)
		}
		for finished := false; !finished; {
			if err := c.receive(func(m nlmsg.Message) {
				if m.Kind != unix.NLMSG_ERROR || m.Seq < first || m.Seq > c.seq {
					return // the answer to an abandoned request
				}
				if err := nlmsg.Refusal(m.Body); err != nil {
					failed(done+int(m.Seq-first), err)
				}
				finished = finished || m.Seq == c.seq
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
func (c *Conn) Dump(r nlmsg.Request, each func(restart bool, body []byte)) error {
	for {
		c.seq++
		if _, err := unix.Write(c.fd, r.Seal(unix.NLM_F_DUMP, c.seq)); err != nil {
			return fmt.Errorf("send a netlink dump request: %w", err)
		}
		each(true, nil)
		interrupted := false
		var refused error
		for finished := false; !finished; {
			if err := c.receive(func(m nlmsg.Message) {
				if m.Seq != c.seq {
					return
				}
				interrupted = interrupted || m.Flags&unix.NLM_F_DUMP_INTR != 0
				switch m.Kind {
				case unix.NLMSG_DONE, unix.NLMSG_ERROR:
					finished, refused = true, nlmsg.Refusal(m.Body)
				default:
					each(false, m.Body)
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
func (c *Conn) receive(each func(nlmsg.Message)) error {
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
	for m, err := range nlmsg.Messages(c.buf[:size]) {
		if err != nil {
			return fmt.Errorf("receive from netlink: %w", err)
		}
		each(m)
	}
	return nil
}
