package nlmsg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRequest: what is written is read back, nested attributes and padding included.
func TestRequest(t *testing.T) {
	r := New(unix.RTM_NEWLINK, unix.NLM_F_CREATE, []byte("body")).Attr(1, []byte("odd")).Uint32(2, 7).
		Nest(3, func(r Request) Request { return r.Attr(4, nil).Attr(5, []byte{9}) }).Seal(unix.NLM_F_ACK, 42)
	if r.Kind() != unix.RTM_NEWLINK || len(r)%unix.NLMSG_ALIGNTO != 0 {
		t.Errorf("kind %d, %d bytes", r.Kind(), len(r))
	}
	found := 0
	for m, err := range Messages(append(bytes.Clone(r), r...)) {
		if found++; err != nil || m.Kind != unix.RTM_NEWLINK || m.Flags != unix.NLM_F_REQUEST|unix.NLM_F_CREATE|unix.NLM_F_ACK || m.Seq != 42 {
			t.Fatalf("%+v, %v", m, err)
		}
		got := map[uint16][]byte{}
		if !Attrs(m.Body[4:], func(kind uint16, data []byte) {
			got[kind] = data
			if kind == 3 && !Attrs(data, func(kind uint16, data []byte) { got[kind] = data }) {
				t.Error("the nested attributes do not fill their attribute")
			}
		}) {
			t.Error("the attributes do not fill the message")
		}
		if string(got[1]) != "odd" || binary.NativeEndian.Uint32(got[2]) != 7 || len(got[4]) != 0 || !bytes.Equal(got[5], []byte{9}) || len(got) != 5 {
			t.Errorf("attributes %v", got)
		}
	}
	if found != 2 {
		t.Errorf("%d messages, want 2", found)
	}
	for _, err := range Messages(append(bytes.Clone(r), r...)) {
		if err != nil {
			t.Error(err)
		}
		break // the iterator stops, or the range panics
	}
}

func TestRefusal(t *testing.T) {
	for code, want := range map[int32]error{0: nil, -int32(unix.ENOENT): unix.ENOENT, 12: nil} { // a dump's end may have a count
		if got := Refusal(binary.NativeEndian.AppendUint32(nil, uint32(code))); got != want {
			t.Errorf("%d: %v, want %v", code, got, want)
		}
	}
	if err := Refusal(nil); err != nil {
		t.Error(err)
	}
}

// FuzzMessages: a datagram is messages to its end, or ErrCutOff; no part reaches beyond what contains it.
func FuzzMessages(f *testing.F) {
	r := New(unix.RTM_NEWROUTE, 0, []byte("body")).Attr(1, []byte{1}).Seal(unix.NLM_F_MULTI, 3)
	f.Add([]byte(append(bytes.Clone(r), r...)))
	f.Add([]byte(r[:len(r)-1]))
	f.Add(binary.NativeEndian.AppendUint32(nil, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		read, messages := 0, 0
		var failed error
		for m, err := range Messages(b) {
			if failed != nil {
				t.Fatal("a message after the error")
			}
			if failed = err; err != nil {
				continue
			}
			read += unix.NLMSG_HDRLEN + len(m.Body)
			messages++
			_ = Refusal(m.Body)
			Attrs(m.Body, func(_ uint16, data []byte) {
				if len(data) > len(m.Body) {
					t.Fatalf("an attribute of %d bytes in %d", len(data), len(m.Body))
				}
				Attrs(data, func(uint16, []byte) {})
			})
		}
		if read > len(b) || failed != nil && !errors.Is(failed, ErrCutOff) {
			t.Errorf("%d of %d bytes were read: %v", read, len(b), failed)
		}
		if rest := len(b) - read; failed == nil && rest >= unix.NLMSG_HDRLEN+messages*(unix.NLMSG_ALIGNTO-1) {
			t.Errorf("%d of %d bytes were left", rest, len(b))
		}
	})
}
