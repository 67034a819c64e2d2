// Package nflog reads the packets that rules log (nftables' "log group", NFLOG): their headers, and the prefix by which a rule says why.
//
// Where nobody reads a group, the kernel forgets what is logged. A group has one reader in a network namespace.
package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// Packet is a packet that was logged.
type Packet struct {
	Prefix   string // the rule's
	From, To netip.Addr
	Protocol uint8
	// SourcePort and Port are those of TCP, UDP and SCTP; 0 if the packet has none, or they are in another fragment.
	SourcePort, Port uint16
}

// Reader reads a group.
type Reader struct {
	file *os.File
	buf  []byte
	next uint32 // number of the next packet
	any  bool
}

// ErrTaken says that another process reads the group.
var ErrTaken = errors.New("another process reads this group")

const (
	msgPacket = unix.NFNL_SUBSYS_ULOG << 8
	msgConfig = unix.NFNL_SUBSYS_ULOG<<8 | 1

	cfgCommand   = 1
	cfgMode      = 2
	cfgTimeout   = 4
	cfgThreshold = 5
	cfgFlags     = 6

	commandBind = 1
	copyPacket  = 2
	flagNumbers = 1

	attrPayload = 9
	attrPrefix  = 10
	attrNumber  = 12

	sizeofNfgenmsg = 4
	bufferBytes    = 256 << 10
	// queueBytes hold what comes while the reader is busy: some thousand packets.
	queueBytes = 1 << 20
	// Packets are handed over when there are so many, or the oldest is so old, in hundredths of a second.
	threshold = 32
	timeout   = 10
)

// Open begins to read a group of the namespace at path, such as /proc/self/ns/net, with so many bytes of each packet at most. The error is
// ErrTaken if another process does.
func Open(path string, group uint16, size uint32) (*Reader, error) {
	ns, err := link.Open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	fd := -1
	if err := ns.Do(func() error {
		var err error
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
		return err
	}); err != nil {
		return nil, fmt.Errorf("open a netlink socket in %s: %w", path, err)
	}
	r := &Reader{file: os.NewFile(uintptr(fd), "nflog"), buf: make([]byte, bufferBytes)}
	if err := r.configure(fd, group, size); err != nil {
		r.Close()
		return nil, fmt.Errorf("read group %d of logged packets in %s: %w", group, path, err)
	}
	return r, nil
}

func (r *Reader) configure(fd int, group uint16, size uint32) error {
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueBytes) // less will do
	number := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	message := nlmsg.New(msgConfig, 0, []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, byte(group >> 8), byte(group)}).
		Attr(cfgCommand, []byte{commandBind}).
		Attr(cfgMode, append(number(size), copyPacket, 0)).
		Attr(cfgTimeout, number(timeout)).
		Attr(cfgThreshold, number(threshold)).
		Attr(cfgFlags, []byte{0, flagNumbers}).
		Seal(unix.NLM_F_ACK, 1)
	if _, err := unix.Write(fd, message); err != nil {
		return err
	}
	_ = r.file.SetReadDeadline(time.Now().Add(patience))
	defer func() { _ = r.file.SetReadDeadline(time.Time{}) }()
	for {
		n, err := r.file.Read(r.buf)
		if err != nil {
			return err
		}
		for m, err := range nlmsg.Messages(r.buf[:n]) {
			if err != nil {
				return err
			}
			if m.Kind != unix.NLMSG_ERROR {
				continue // a packet already
			}
			switch err := nlmsg.Refusal(m.Body); {
			case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY):
				return fmt.Errorf("%w (or the right to is missing): %w", ErrTaken, err)
			default:
				return err
			}
		}
	}
}

// patience is long for a kernel that answers within the system call.
const patience = 5 * time.Second

// Close ends reading.
func (r *Reader) Close() { r.file.Close() }

// Run calls each for every packet until the context ends or reading fails, and lost with the number of those that the kernel could not hand
// over because they were too many. What each gets is its own.
func (r *Reader) Run(ctx context.Context, each func(Packet), lost func(int)) error {
	defer context.AfterFunc(ctx, func() { _ = r.file.SetReadDeadline(time.Now()) })()
	for {
		n, err := r.file.Read(r.buf)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS): // the numbers say how many
			continue
		case err != nil:
			return fmt.Errorf("read logged packets: %w", err)
		}
		for m, err := range nlmsg.Messages(r.buf[:n]) {
			if err != nil {
				return fmt.Errorf("read logged packets: %w", err)
			}
			if m.Kind != msgPacket {
				continue
			}
			p, at, err := parse(m.Body)
			if missing := at - r.next; r.any && missing > 0 && missing < 1<<31 {
				lost(int(missing))
			}
			r.next, r.any = at+1, true
			if err == nil {
				each(p)
			}
		}
	}
}

var errMalformed = errors.New("a logged packet is malformed")

// parse reads a message, and its number, which it has even if nothing can be made of the packet.
func parse(body []byte) (p Packet, number uint32, err error) {
	if len(body) < sizeofNfgenmsg {
		return p, 0, errMalformed
	}
	var payload []byte
	ok := nlmsg.Attrs(body[sizeofNfgenmsg:], func(kind uint16, data []byte) {
		switch {
		case kind == attrPayload:
			payload = data
		case kind == attrPrefix && len(data) > 0:
			p.Prefix = string(data[:len(data)-1])
		case kind == attrNumber && len(data) == 4:
			number = binary.BigEndian.Uint32(data)
		}
	})
	if !ok || !p.parseIP(payload) {
		return Packet{}, number, errMalformed
	}
	return p, number, nil
}

func (p *Packet) parseIP(b []byte) bool {
	if len(b) == 0 {
		return false
	}
	switch b[0] >> 4 {
	case 4:
		size := int(b[0]&0xf) * 4
		if size < 20 || len(b) < size {
			return false
		}
		p.From, p.To = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		p.Protocol = b[9]
		if binary.BigEndian.Uint16(b[6:])&0x1fff == 0 { // the first fragment
			p.parsePorts(b[size:])
		}
		return true
	case 6:
		if len(b) < 40 {
			return false
		}
		p.From, p.To = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		p.parseExtensions(b[6], b[40:])
		return true
	}
	return false
}

// parseExtensions follows the headers of an IPv6 packet to that of its protocol.
func (p *Packet) parseExtensions(next uint8, b []byte) {
	for {
		p.Protocol = next
		size := 8
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) > 1 {
				size += int(b[1]) * 8
			}
		case unix.IPPROTO_AH:
			if len(b) > 1 {
				size = (int(b[1]) + 2) * 4
			}
		case unix.IPPROTO_FRAGMENT:
			if len(b) >= 8 && binary.BigEndian.Uint16(b[2:])&^7 != 0 { // not the first one
				p.Protocol = b[0]
				return
			}
		default:
			p.parsePorts(b)
			return
		}
		if len(b) < size {
			return
		}
		next, b = b[0], b[size:]
	}
}

func (p *Packet) parsePorts(b []byte) {
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
		if len(b) >= 4 {
			p.SourcePort, p.Port = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
		}
	}
}
