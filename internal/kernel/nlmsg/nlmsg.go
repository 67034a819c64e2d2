// Package nlmsg encodes and decodes netlink messages, for the packages that speak netlink themselves because no library streams
// dumps or batches requests as they need it. Layout: Documentation/userspace-api/netlink/intro.rst.
package nlmsg

import (
	"encoding/binary"
	"errors"
	"iter"

	"golang.org/x/sys/unix"
)

// Request is a netlink message, incomplete until Seal.
type Request []byte

// New starts a message of a kind; body is the fixed part of that kind.
func New(kind, flags uint16, body []byte) Request {
	r := make(Request, unix.NLMSG_HDRLEN, 192)
	binary.NativeEndian.PutUint16(r[4:], kind)
	binary.NativeEndian.PutUint16(r[6:], flags|unix.NLM_F_REQUEST)
	return append(r, body...)
}

// Kind returns the kind of message, such as RTM_NEWROUTE.
func (r Request) Kind() uint16 { return binary.NativeEndian.Uint16(r[4:]) }

// Attr appends an attribute.
func (r Request) Attr(kind uint16, data []byte) Request {
	r = binary.NativeEndian.AppendUint16(r, uint16(unix.SizeofNlAttr+len(data)))
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

// Nest appends an attribute that contains the attributes that inside appends.
func (r Request) Nest(kind uint16, inside func(Request) Request) Request {
	at := len(r)
	r = inside(r.Attr(kind|unix.NLA_F_NESTED, nil))
	binary.NativeEndian.PutUint16(r[at:], uint16(len(r)-at))
	return r
}

// Seal completes the message in place: its length, its sequence number, and further flags.
func (r Request) Seal(flags uint16, seq uint32) Request {
	binary.NativeEndian.PutUint32(r[0:], uint32(len(r)))
	binary.NativeEndian.PutUint16(r[6:], binary.NativeEndian.Uint16(r[6:])|flags)
	binary.NativeEndian.PutUint32(r[8:], seq)
	return r
}

// Message is a message of the kernel's.
type Message struct {
	Kind, Flags uint16
	Seq         uint32
	Body        []byte // valid as long as the datagram
}

// ErrCutOff says that a datagram ends within a message.
var ErrCutOff = errors.New("a netlink message is cut off")

// Messages iterates over a datagram's messages. The last one may come with ErrCutOff, and is then empty.
func Messages(b []byte) iter.Seq2[Message, error] {
	return func(yield func(Message, error) bool) {
		for len(b) >= unix.NLMSG_HDRLEN {
			length := uint64(binary.NativeEndian.Uint32(b))
			if length < unix.NLMSG_HDRLEN || length > uint64(len(b)) {
				yield(Message{}, ErrCutOff)
				return
			}
			m := Message{
				Kind: binary.NativeEndian.Uint16(b[4:]), Flags: binary.NativeEndian.Uint16(b[6:]), Seq: binary.NativeEndian.Uint32(b[8:]),
				Body: b[unix.NLMSG_HDRLEN:length],
			}
			if !yield(m, nil) {
				return
			}
			b = b[min(len(b), align(int(length))):]
		}
	}
}

// Refusal returns the error in the body of a message that ends an answer (NLMSG_ERROR or NLMSG_DONE), a unix.Errno, or nil.
func Refusal(body []byte) error {
	if len(body) < 4 {
		return nil
	}
	if errno := -int32(binary.NativeEndian.Uint32(body)); errno > 0 {
		return unix.Errno(errno)
	}
	return nil
}

// Attrs calls each for the attributes in b, without the flags of their kinds, and reports whether b consists of attributes to its
// end. It takes a function, and is no iterator, because dumps call it hundreds of thousands of times: it allocates nothing.
func Attrs(b []byte, each func(kind uint16, data []byte)) bool {
	for len(b) >= unix.SizeofNlAttr {
		length := int(binary.NativeEndian.Uint16(b))
		if length < unix.SizeofNlAttr || length > len(b) {
			return false
		}
		each(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofNlAttr:length])
		b = b[min(len(b), align(length)):]
	}
	return len(b) == 0
}

func align(n int) int { return (n + unix.NLMSG_ALIGNTO - 1) &^ (unix.NLMSG_ALIGNTO - 1) }
