// Package conntrack lists and ends flows that the kernel remembers: entries of connection tracking, and sockets. Both
// outlive their endpoint: the kernel keeps sending a flow's packets to an endpoint that is gone.
//
// It speaks netlink itself (nlmsg), because no library streams: the existing ones for connection tracking return a list of
// all entries, copied twice, and a node has hundreds of thousands.
package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
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
	// batch is how many requests are sent at once. The kernel queues an answer for each that it rejects before the first is
	// read, and those of a full batch fit the smallest usual queue.
	batch = 128
	// patience is long for a kernel that answers within the system call. It turns a lost answer into an error instead of a
	// goroutine that waits for ever.
	patience = 20 * time.Second
	// restarts is how often an interrupted dump is repeated.
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

// execute sends a batch of requests. It returns the kernel's answer to each: nil, or the error with which it was rejected.
func (c *conn) execute(requests []nlmsg.Request) ([]error, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	first := c.seq + 1
	var out []byte
	for i, r := range requests {
		c.seq++
		var flags uint16
		if i == len(requests)-1 {
			flags = unix.NLM_F_ACK // it comes after all others
		}
		out = append(out, r.Seal(flags, c.seq)...)
	}
	if _, err := unix.Write(c.fd, out); err != nil {
		return nil, fmt.Errorf("send netlink requests: %w", err)
	}
	answers := make([]error, len(requests))
	for finished := false; !finished; {
		if err := c.receive(func(m nlmsg.Message) {
			if at := m.Seq - first; m.Kind == unix.NLMSG_ERROR && at < uint32(len(requests)) {
				answers[at] = nlmsg.Refusal(m.Body)
				finished = finished || m.Seq == c.seq
			}
		}); err != nil {
			return nil, err
		}
	}
	return answers, nil
}

// dump calls each with the body of every message that answers the request; the body is valid until each returns. An
// interrupted dump is repeated, so each may see a thing twice. After each has returned an error or ctx has ended, dump
// reads and discards the rest, so that the socket can be used again.
func (c *conn) dump(ctx context.Context, r nlmsg.Request, each func(body []byte) error) error {
	return c.ask(ctx, r, unix.NLM_F_DUMP, each)
}

// ask is dump, also for requests with a single answer, which use NLM_F_ACK.
func (c *conn) ask(ctx context.Context, r nlmsg.Request, flags uint16, each func(body []byte) error) error {
	for range restarts {
		c.seq++
		if _, err := unix.Write(c.fd, r.Seal(flags, c.seq)); err != nil {
			return fmt.Errorf("send a netlink request: %w", err)
		}
		var stop, refused error
		interrupted := false
		for finished := false; !finished; {
			if stop == nil {
				stop = ctx.Err()
			}
			if err := c.receive(func(m nlmsg.Message) {
				if m.Seq != c.seq {
					return // the answer to an abandoned request
				}
				interrupted = interrupted || m.Flags&unix.NLM_F_DUMP_INTR != 0
				switch {
				case m.Kind == unix.NLMSG_DONE || m.Kind == unix.NLMSG_ERROR:
					finished, refused = true, nlmsg.Refusal(m.Body)
				case m.Kind >= unix.NLMSG_MIN_TYPE && stop == nil:
					stop = each(m.Body)
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
func (c *conn) receive(each func(nlmsg.Message)) error {
	for {
		size, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return fmt.Errorf("receive from netlink: no answer within %s", patience)
		case err != nil:
			return fmt.Errorf("receive from netlink: %w", err)
		default:
			for m, err := range nlmsg.Messages(c.buf[:size]) {
				if err != nil {
					return fmt.Errorf("receive from netlink: %w", err)
				}
				each(m)
			}
			return nil
		}
	}
}

// sameFamily reports whether the addresses are valid and of one family.
func sameFamily(addrs ...netip.Addr) bool {
	for _, a := range addrs {
		if !a.IsValid() || a.Is4() != addrs[0].Is4() {
			return false
		}
	}
	return true
}
