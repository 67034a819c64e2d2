package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// Connections calls each for every TCP connection of the namespace as its client began it: the side that does not listen at its port is the
// client. An error of each stops it and is returned.
func (s *Sockets) Connections(ctx context.Context, each func(Tuple) error) error {
	listening := map[uint16]bool{}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		r := nlmsg.New(unix.SOCK_DIAG_BY_FAMILY, 0, diagRequest(family, service.TCP, 1<<stateListen, [sizeofSockID]byte{}))
		err := s.conn.dump(ctx, r, func(body []byte) error {
			socket, err := parseSocket(service.TCP, body)
			listening[socket.Local.Port()] = true
			return err
		})
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("%w: the kernel has no sock_diag for it", errors.ErrUnsupported)
		}
		if err != nil {
			return fmt.Errorf("list TCP sockets that listen in %s: %w", s.path, err)
		}
	}
	return s.List(ctx, service.TCP, nil, func(socket Socket) error {
		if listening[socket.Local.Port()] {
			return each(Tuple{Source: socket.Remote, Destination: socket.Local})
		}
		return each(Tuple{Source: socket.Local, Destination: socket.Remote})
	})
}

// Adopt has connection tracking know TCP connections that it has not seen begin, as their clients began them, and returns how many it did not
// know so. Without this, the next packet of either end makes an entry, in the direction of that packet; entries that were made in this way
// are replaced. Sequence numbers are not checked in these: they are not known.
func (c *Table) Adopt(ctx context.Context, list []Tuple) (adopted int, err error) {
	known := map[Tuple]bool{} // as seen by the server
	for rest := list; len(rest) > 0; {
		next := rest[:min(batch, len(rest))]
		rest = rest[len(next):]
		answers, err := c.adopt(next)
		if err != nil {
			return adopted, err
		}
		for i, answer := range answers {
			switch {
			case answer == nil:
				adopted++
			case errors.Is(answer, unix.EEXIST): // also if it is translated: then its replies are known
				known[next[i].reversed()] = true
			default:
				return adopted, fmt.Errorf("make an entry of connection tracking in %s: %w", c.path, answer)
			}
		}
	}
	if len(known) == 0 {
		return adopted, nil
	}
	var turned []Entry
	err = c.Entries(ctx, Filter{Protocols: []service.Protocol{service.TCP}}, func(e Entry) error {
		if known[e.Original] && e.Reply == e.Original.reversed() {
			turned = append(turned, e)
		}
		return nil
	})
	if err != nil {
		return adopted, err
	}
	for _, e := range turned {
		if _, err := c.Delete(e); err != nil {
			return adopted, err
		}
		answers, err := c.adopt([]Tuple{e.Reply})
		if err != nil {
			return adopted, err
		}
		if answers[0] == nil { // else a packet was faster, and the next time will do
			adopted++
		}
	}
	return adopted, nil
}

func (c *Table) adopt(list []Tuple) ([]error, error) {
	var requests []nlmsg.Request
	for _, t := range list {
		if !sameFamily(t.Source.Addr(), t.Destination.Addr()) {
			return nil, fmt.Errorf("make an entry of connection tracking in %s: from %s to %s there is no connection", c.path, t.Source, t.Destination)
		}
		requests = append(requests, adoptRequest(t))
	}
	answers, err := c.end.execute(requests)
	if err != nil {
		return nil, fmt.Errorf("make entries of connection tracking in %s: %w", c.path, err)
	}
	return answers, nil
}

func (t Tuple) reversed() Tuple { return Tuple{t.Destination, t.Source, t.Zone} }

// Attributes of an entry's TCP state, from linux/netfilter/nfnetlink_conntrack.h, and flags from nf_conntrack_tcp.h.
const (
	ctaProtoInfo               = 4
	ctaProtoInfoTCP            = 1
	ctaTCPState                = 1
	ctaTCPFlagsOriginal        = 4
	ctaTCPFlagsReply           = 5
	tcpEstablished             = 3
	tcpFlagLiberal             = 8
	adoptedTimeout             = 24 * time.Hour // until a packet comes, with which the kernel sets its own
	stateListen                = 10
	confirmed           Status = 1 << 3
)

func adoptRequest(t Tuple) nlmsg.Request {
	family := uint8(unix.AF_INET6)
	if t.Source.Addr().Is4() {
		family = unix.AF_INET
	}
	number := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	r := nlmsg.New(msgNew, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nfgenmsg(family))
	r = appendTuple(r, ctaTupleOrig, service.TCP, t)
	r = appendTuple(r, ctaTupleReply, service.TCP, t.reversed())
	return r.Attr(ctaTimeout, number(uint32(adoptedTimeout/time.Second))).
		Attr(ctaStatus, number(uint32(confirmed|SeenReply|Assured))).
		Nest(ctaProtoInfo, func(r nlmsg.Request) nlmsg.Request {
			return r.Nest(ctaProtoInfoTCP, func(r nlmsg.Request) nlmsg.Request {
				liberal := []byte{tcpFlagLiberal, tcpFlagLiberal}
				return r.Attr(ctaTCPState, []byte{tcpEstablished}).Attr(ctaTCPFlagsOriginal, liberal).Attr(ctaTCPFlagsReply, liberal)
			})
		})
}
