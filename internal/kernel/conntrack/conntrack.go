package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"golang.org/x/sys/unix"
)

// Status is the bits of an entry of connection tracking, IPS_* in linux/netfilter/nf_conntrack_common.h.
type Status uint32

// Bits of Status.
const (
	Expected  Status = 1 << 0 // another connection has announced it
	SeenReply Status = 1 << 1
	Assured   Status = 1 << 2
	SNAT      Status = 1 << 4
	DNAT      Status = 1 << 5
)

// Entry is an entry of connection tracking. Original is the flow as its first packet was sent, Reply as its replies arrive:
// Reply.Source is the real peer, whatever the client believes.
type Entry struct {
	Protocol        service.Protocol
	Original, Reply Tuple
	Status          Status
	// Timeout is how long the entry lives without a further packet.
	Timeout time.Duration
	// ID is the kernel's number of the entry. It is derived from the entry's address in memory and from Original, so a
	// newer entry with the same Original may have the number of an older one.
	ID uint32
	// Mark is what programs and rules have left there, by which rules find the entry's packets (ct mark).
	Mark uint32
}

// Tuple is what packets in one direction have in common. ICMP has no ports: there Source's port is the identifier, and Destination's is
// type and code, as in the kernel's own tuples.
type Tuple struct {
	Source, Destination netip.AddrPort
	Zone                uint16 // nearly always 0
}

// String returns the entry as people write it, "UDP 10.244.0.5:4711 > 10.96.0.10:53, answered by 10.244.1.7:53".
func (e Entry) String() string {
	return fmt.Sprintf("%s %s > %s, answered by %s", e.Protocol, e.Original.Source, e.Original.Destination, e.Reply.Source)
}

// Filter selects entries; its zero value selects all of TCP, UDP and SCTP.
type Filter struct {
	Protocols []service.Protocol
	// AnyProtocol selects all protocols, also those without ports.
	AnyProtocol bool
	DNAT        bool // only those that go elsewhere than they were sent
}

// Table is connection tracking in a network namespace. It is for one goroutine at a time. After a netlink error, close it
// and open it again.
type Table struct {
	path      string
	list, end *conn // two, so that entries can be ended while they are listed
	// unfiltered is up to how many entries all are listed and filtered here.
	unfiltered uint32
}

// OpenTable opens connection tracking of the namespace at path, such as /proc/self/ns/net.
func OpenTable(path string) (*Table, error) {
	list, err := dial(path, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open connection tracking: %w", err)
	}
	end, err := dial(path, unix.NETLINK_NETFILTER)
	if err != nil {
		list.close()
		return nil, fmt.Errorf("open connection tracking: %w", err)
	}
	return &Table{path, list, end, countUnfiltered}, nil
}

// Close closes what OpenTable opened. The entries stay.
func (c *Table) Close() {
	c.list.close()
	c.end.close()
}

// Entries calls each for every entry while they are read, without building a list. An entry that exists all the time is
// seen at least once; one that comes or goes meanwhile may be seen. An error of each stops the dump and is returned.
func (c *Table) Entries(ctx context.Context, f Filter, each func(Entry) error) error {
	protocols := f.Protocols
	if protocols == nil {
		protocols = []service.Protocol{service.TCP, service.UDP, service.SCTP}
	}
	count, err := c.count(ctx)
	if err != nil {
		return err
	}
	requests := []nlmsg.Request{dumpRequest(f.DNAT)}
	switch {
	case count == 0: // as in most pods: no walk at all
		return nil
	case count > c.unfiltered && !f.AnyProtocol:
		requests = requests[:0]
		for _, protocol := range protocols {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				requests = append(requests, dumpRequestOf(family, protocol, f.DNAT))
			}
		}
	}
	for _, r := range requests {
		err := c.list.dump(ctx, r, func(body []byte) error {
			e, err := parseEntry(body)
			if err != nil {
				return err
			}
			// Checked again, since kernels before 5.8 do not filter by protocol, and those before 5.15 not by status.
			if !f.AnyProtocol && !slices.Contains(protocols, e.Protocol) || f.DNAT && e.Status&DNAT == 0 {
				return nil
			}
			return each(e)
		})
		if err != nil {
			return fmt.Errorf("list connection tracking's entries in %s: %w", c.path, err)
		}
	}
	return nil
}

// countUnfiltered is Table.unfiltered outside of tests. The kernel filters by one protocol of one family at a time, and
// walks its whole table for each, 50 ns for each of usually 262,144 buckets: with fewer entries that takes longer than
// reading the unwanted ones.
const countUnfiltered = 50_000

// count returns how many entries the namespace has, without a walk.
func (c *Table) count(ctx context.Context) (count uint32, err error) {
	const ctaStatsGlobalEntries = 1
	found := false
	err = c.list.ask(ctx, nlmsg.New(msgGetStats, 0, nfgenmsg(unix.AF_UNSPEC)), unix.NLM_F_ACK, func(body []byte) error {
		nlmsg.Attrs(body[min(len(body), sizeofNfgenmsg):], func(kind uint16, data []byte) {
			if kind == ctaStatsGlobalEntries {
				count, found = bigEndian(data, 4), true
			}
		})
		return nil
	})
	if err == nil && !found {
		err = errMalformed
	}
	if err != nil {
		return 0, fmt.Errorf("count connection tracking's entries in %s: %w", c.path, err)
	}
	return count, nil
}

// Sweep ends the entries of these protocols that stale selects, and returns how many. It does not hit other flows, not even
// one that has taken an entry's place meanwhile and goes elsewhere.
func (c *Table) Sweep(ctx context.Context, protocols []service.Protocol, stale func(Entry) bool) (deleted int, err error) {
	if len(protocols) == 0 {
		return 0, nil // nil would mean all
	}
	pending := make([]nlmsg.Request, 0, batch)
	flush := func() error {
		n, err := c.delete(pending)
		deleted, pending = deleted+n, pending[:0]
		return err
	}
	err = c.Entries(ctx, Filter{Protocols: protocols}, func(e Entry) error {
		if !stale(e) {
			return nil
		}
		r, err := deleteRequest(e)
		if err != nil {
			return err
		}
		pending = append(pending, r)
		if len(pending) < batch {
			return nil
		}
		return flush()
	})
	return deleted, errors.Join(err, flush())
}

// Delete ends the entry, and reports whether it existed. If a newer entry with the same tuples has taken its place, that
// one is ended too if the kernel gave it the same number; it is as stale as the old one.
func (c *Table) Delete(e Entry) (bool, error) {
	r, err := deleteRequest(e)
	if err != nil {
		return false, err
	}
	n, err := c.delete([]nlmsg.Request{r})
	return n == 1, err
}

func (c *Table) delete(requests []nlmsg.Request) (deleted int, err error) {
	answers, err := c.end.execute(requests)
	if err != nil {
		return 0, fmt.Errorf("delete connection tracking's entries in %s: %w", c.path, err)
	}
	for _, answer := range answers {
		switch {
		case answer == nil:
			deleted++
		case errors.Is(answer, unix.ENOENT): // it has ended by itself, or another is in its place
		default:
			err = fmt.Errorf("delete an entry of connection tracking in %s: %w", c.path, answer)
		}
	}
	return deleted, err
}

// Kinds of messages and attributes, from linux/netfilter/nfnetlink_conntrack.h.
const (
	msgNew      = unix.NFNL_SUBSYS_CTNETLINK << 8
	msgGet      = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	msgDelete   = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2
	msgGetStats = unix.NFNL_SUBSYS_CTNETLINK<<8 | 5

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaTimeout    = 7
	ctaMark       = 8
	ctaID         = 12
	ctaZone       = 18
	ctaMarkMask   = 21
	ctaFilter     = 25
	ctaStatusMask = 26

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIPv4Source      = 1
	ctaIPv4Destination = 2
	ctaIPv6Source      = 3
	ctaIPv6Destination = 4

	ctaProtoNum             = 1
	ctaProtoSourcePort      = 2
	ctaProtoDestinationPort = 3
	ctaProtoICMPID          = 4
	ctaProtoICMPType        = 5
	ctaProtoICMPCode        = 6
	ctaProtoICMPv6ID        = 7
	ctaProtoICMPv6Type      = 8
	ctaProtoICMPv6Code      = 9

	ctaFilterOrigFlags = 1
	// filterProtoNum is a bit of those flags: filter by protocol. It is the kernel's CTA_FILTER_F_CTA_PROTO_NUM, which is
	// in no header for programs.
	filterProtoNum = 1 << 3
)

// nfgenmsg is the fixed part of netfilter's messages.
func nfgenmsg(family uint8) []byte { return []byte{family, unix.NFNETLINK_V0, 0, 0} }

const sizeofNfgenmsg = 4

// dumpRequest requests all entries, or all translated ones.
func dumpRequest(dnat bool) nlmsg.Request {
	r := nlmsg.New(msgGet, 0, nfgenmsg(unix.AF_UNSPEC))
	if dnat {
		r = translated(r)
	}
	return r
}

// dumpRequestOf requests those of a protocol in a family; the kernel filters by protocol only within a family.
func dumpRequestOf(family uint8, protocol service.Protocol, dnat bool) nlmsg.Request {
	r := nlmsg.New(msgGet, 0, nfgenmsg(family))
	if dnat {
		r = translated(r)
	}
	return r.Nest(ctaTupleOrig, func(r nlmsg.Request) nlmsg.Request {
		return r.Nest(ctaTupleProto, func(r nlmsg.Request) nlmsg.Request { return r.Attr(ctaProtoNum, []byte{uint8(protocol)}) })
	}).Nest(ctaFilter, func(r nlmsg.Request) nlmsg.Request {
		return r.Attr(ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, filterProtoNum))
	})
}

func translated(r nlmsg.Request) nlmsg.Request {
	bit := binary.BigEndian.AppendUint32(nil, uint32(DNAT))
	return r.Attr(ctaStatus, bit).Attr(ctaStatusMask, bit)
}

// deleteRequest identifies an entry by its reply tuple and its number. Rejected: the original tuple, by which other
// programs identify entries. A client that keeps sending gets a new entry with the same one, often at the same place in
// memory and so with the same number. The reply tuple says which endpoint answers, and that is what has changed.
func deleteRequest(e Entry) (nlmsg.Request, error) {
	r, err := replyRequest(msgDelete, e)
	if err != nil {
		return nil, fmt.Errorf("delete %s of connection tracking: %w", e, err) // without a tuple all would go
	}
	return r.Attr(ctaID, binary.BigEndian.AppendUint32(nil, e.ID)), nil
}

// replyRequest is a request about the entry that has the reply tuple of e.
func replyRequest(kind uint16, e Entry) (nlmsg.Request, error) {
	source, destination := e.Reply.Source.Addr(), e.Reply.Destination.Addr()
	if !sameFamily(source, destination) {
		return nil, errors.New("it has no addresses")
	}
	family := uint8(unix.AF_INET6)
	if source.Is4() {
		family = unix.AF_INET
	}
	r := appendTuple(nlmsg.New(kind, 0, nfgenmsg(family)), ctaTupleReply, e.Protocol, e.Reply)
	if e.Reply.Zone != 0 {
		r = r.Attr(ctaZone, binary.BigEndian.AppendUint16(nil, e.Reply.Zone))
	}
	return r, nil
}

// appendTuple appends the addresses and ports of a tuple. They are of one family.
func appendTuple(r nlmsg.Request, kind uint16, protocol service.Protocol, t Tuple) nlmsg.Request {
	ipSource, ipDestination := uint16(ctaIPv6Source), uint16(ctaIPv6Destination)
	if t.Source.Addr().Is4() {
		ipSource, ipDestination = ctaIPv4Source, ctaIPv4Destination
	}
	return r.Nest(kind, func(r nlmsg.Request) nlmsg.Request {
		r = r.Nest(ctaTupleIP, func(r nlmsg.Request) nlmsg.Request {
			return r.Attr(ipSource, t.Source.Addr().AsSlice()).Attr(ipDestination, t.Destination.Addr().AsSlice())
		})
		return r.Nest(ctaTupleProto, func(r nlmsg.Request) nlmsg.Request {
			r = r.Attr(ctaProtoNum, []byte{uint8(protocol)})
			id, kind, code := uint16(ctaProtoICMPID), uint16(ctaProtoICMPType), uint16(ctaProtoICMPCode)
			switch protocol {
			case unix.IPPROTO_ICMPV6:
				id, kind, code = ctaProtoICMPv6ID, ctaProtoICMPv6Type, ctaProtoICMPv6Code
				fallthrough
			case unix.IPPROTO_ICMP:
				return r.Attr(id, binary.BigEndian.AppendUint16(nil, t.Source.Port())).
					Attr(kind, []byte{uint8(t.Destination.Port() >> 8)}).Attr(code, []byte{uint8(t.Destination.Port())})
			}
			return r.Attr(ctaProtoSourcePort, binary.BigEndian.AppendUint16(nil, t.Source.Port())).
				Attr(ctaProtoDestinationPort, binary.BigEndian.AppendUint16(nil, t.Destination.Port()))
		})
	})
}

// errMalformed is for messages that the kernel would not send.
var errMalformed = errors.New("a message of connection tracking is not as it should be")

// parseEntry parses the body of a message with an entry. It is called for every entry of a node repeatedly, so it must not
// allocate.
func parseEntry(body []byte) (Entry, error) {
	if len(body) < sizeofNfgenmsg {
		return Entry{}, errMalformed
	}
	var e Entry
	var replyProtocol service.Protocol
	numbered := false
	ok := nlmsg.Attrs(body[sizeofNfgenmsg:], func(kind uint16, data []byte) {
		switch kind {
		case ctaTupleOrig:
			e.Protocol = e.Original.parse(data)
		case ctaTupleReply:
			replyProtocol = e.Reply.parse(data)
		case ctaStatus:
			e.Status = Status(bigEndian(data, 4))
		case ctaMark:
			e.Mark = bigEndian(data, 4)
		case ctaTimeout:
			e.Timeout = time.Duration(bigEndian(data, 4)) * time.Second
		case ctaID:
			e.ID, numbered = bigEndian(data, 4), len(data) >= 4
		case ctaZone: // of both directions; a zone of one is in its tuple
			e.Original.Zone = uint16(bigEndian(data, 2))
			e.Reply.Zone = e.Original.Zone
		}
	})
	if !ok || !numbered || e.Protocol != replyProtocol || !sameFamily(e.Original.Source.Addr(), e.Original.Destination.Addr()) ||
		!sameFamily(e.Reply.Source.Addr(), e.Reply.Destination.Addr()) {
		return Entry{}, errMalformed
	}
	return e, nil
}

func (t *Tuple) parse(b []byte) (protocol service.Protocol) {
	var source, destination netip.Addr
	var sourcePort, destinationPort uint16
	nlmsg.Attrs(b, func(kind uint16, data []byte) {
		switch kind {
		case ctaTupleIP:
			nlmsg.Attrs(data, func(kind uint16, data []byte) {
				switch kind {
				case ctaIPv4Source, ctaIPv6Source:
					source, _ = netip.AddrFromSlice(data)
				case ctaIPv4Destination, ctaIPv6Destination:
					destination, _ = netip.AddrFromSlice(data)
				}
			})
		case ctaTupleProto:
			nlmsg.Attrs(data, func(kind uint16, data []byte) {
				switch kind {
				case ctaProtoNum:
					protocol = service.Protocol(bigEndian(data, 1))
				case ctaProtoSourcePort:
					sourcePort = uint16(bigEndian(data, 2))
				case ctaProtoDestinationPort:
					destinationPort = uint16(bigEndian(data, 2))
				case ctaProtoICMPID, ctaProtoICMPv6ID:
					sourcePort = uint16(bigEndian(data, 2))
				case ctaProtoICMPType, ctaProtoICMPv6Type:
					destinationPort |= uint16(bigEndian(data, 1)) << 8
				case ctaProtoICMPCode, ctaProtoICMPv6Code:
					destinationPort |= uint16(bigEndian(data, 1))
				}
			})
		case ctaTupleZone:
			t.Zone = uint16(bigEndian(data, 2))
		}
	})
	t.Source, t.Destination = netip.AddrPortFrom(source, sourcePort), netip.AddrPortFrom(destination, destinationPort)
	return protocol
}

// bigEndian returns the number in the first size bytes, or 0 if there are fewer.
func bigEndian(data []byte, size int) (n uint32) {
	if len(data) < size {
		return 0
	}
	for _, b := range data[:size] {
		n = n<<8 | uint32(b)
	}
	return n
}
