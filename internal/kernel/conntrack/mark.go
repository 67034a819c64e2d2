package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// SetMark sets the bits in the marks of those entries of all protocols for which marked returns true, clears them in all others,
// leaves other bits as they are, and returns how many entries it changed. An entry that has ended meanwhile is left out.
//
// A mark outlives what deletion does not: when the entry of a TCP connection is deleted, the next packet of either end begins
// it anew (nf_conntrack_tcp_loose), in the direction of that packet.
func (c *Table) SetMark(ctx context.Context, bits uint32, marked func(Entry) bool) (set, cleared int, err error) {
	pending := make([]nlmsg.Request, 0, batch)
	sets := make([]bool, 0, batch)
	flush := func() error {
		answers, err := c.end.execute(pending)
		if err != nil {
			return fmt.Errorf("mark connection tracking's entries in %s: %w", c.path, err)
		}
		for i, answer := range answers {
			switch {
			case errors.Is(answer, unix.ENOENT): // it has ended by itself
			case answer != nil:
				err = fmt.Errorf("mark an entry of connection tracking in %s: %w", c.path, answer)
			case sets[i]:
				set++
			default:
				cleared++
			}
		}
		pending, sets = pending[:0], sets[:0]
		return err
	}
	err = c.Entries(ctx, Filter{AnyProtocol: true}, func(e Entry) error {
		is := marked(e)
		if is == (e.Mark&bits == bits) {
			return nil
		}
		r, err := markRequest(e, bits, is)
		if err != nil {
			return err
		}
		if pending, sets = append(pending, r), append(sets, is); len(pending) < batch {
			return nil
		}
		return flush()
	})
	return set, cleared, errors.Join(err, flush())
}

// markRequest identifies an entry by its reply tuple, as deleteRequest does. The kernel takes no number here: an entry that has taken this
// one's place meanwhile is marked instead of it. It has the same endpoint, so it is nearly always as much allowed.
func markRequest(e Entry, bits uint32, is bool) (nlmsg.Request, error) {
	r, err := replyRequest(msgNew, e)
	if err != nil {
		return nil, fmt.Errorf("mark %s of connection tracking: %w", e, err)
	}
	value := uint32(0)
	if is {
		value = bits
	}
	return r.Attr(ctaMark, binary.BigEndian.AppendUint32(nil, value)).Attr(ctaMarkMask, binary.BigEndian.AppendUint32(nil, bits)), nil
}
