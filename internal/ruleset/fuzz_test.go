package ruleset

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// message is an element as a transaction has it, without the header of its attribute.
func elementMessage(e element) []byte {
	t := &transaction{}
	t.element(e, true)
	return t.buf[unix.SizeofNlAttr:]
}

var elementSeeds = []element{
	{key: "\x0a\x60\x00\x0a"},
	{key: "\x0a\x60\x00\x0a", keyEnd: "\x0a\x60\x00\xff", comment: "default/web"},
	{key: "\x0a\x60\x00\x0a", end: true},
	{key: "\x0a\x60\x00\x0a\x00\x50\x00\x00", value: "\x0a\xf4\x01\x07"},
	{key: "\x0a\x60\x00\x0a", verdict: true, code: expr.VerdictGoto, value: "service-1"},
	{key: "\x0a\x60\x00\x0a", verdict: true, code: expr.VerdictDrop},
}

// What a transaction says of an element is read as that element.
func TestElementOf(t *testing.T) {
	for _, want := range elementSeeds {
		whole := elementMessage(want)
		if got := elementOf(whole); got != want {
			t.Errorf("%+v is read as %+v", want, got)
		}
		for size := range whole { // nothing is read that is not there
			elementOf(whole[:size:size])
		}
	}
}

func FuzzElement(f *testing.F) {
	for _, e := range elementSeeds {
		f.Add(elementMessage(e))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e := elementOf(b)
		size := len(e.key) + len(e.keyEnd) + len(e.value) + len(e.comment)
		if size > len(b) {
			t.Fatalf("%d bytes are read out of %d: %+v", size, len(b), e)
		}
		// One that fits into a message again is the same when it is read again.
		if size < 200 && e.key != "" && !strings.ContainsRune(e.comment, 0) && (!e.verdict || !strings.ContainsRune(e.value, 0)) {
			if again := elementOf(elementMessage(e)); again != e {
				t.Errorf("%+v is read again as %+v", e, again)
			}
		}
	})
}

// A datagram is messages to its end, or an error; none reaches beyond it.
func FuzzMessages(f *testing.F) {
	t := newTransaction("services")
	t.addTable()
	f.Add(bytes.Clone(t.buf))
	f.Add(binary.NativeEndian.AppendUint32(nil, 1<<31))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := 0
		_, err := eachMessage(b, func(_ uint16, _ uint32, payload []byte) bool {
			read += unix.NLMSG_HDRLEN + len(payload)
			eachAttribute(payload, func(_ uint16, data []byte) {
				if len(data) > len(payload) {
					t.Fatalf("an attribute of %d bytes in %d", len(data), len(payload))
				}
			})
			return true
		})
		if read > len(b) {
			t.Errorf("%d of %d bytes were read: %v", read, len(b), err)
		}
	})
}
