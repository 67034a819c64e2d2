package rtnl

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// A datagram is messages to its end, or an error; none reaches beyond it.
func FuzzMessages(f *testing.F) {
	r := New(unix.RTM_NEWROUTE, 0, []byte("body"))
	binary.NativeEndian.PutUint32(r, uint32(len(r)))
	f.Add(append(append([]byte(nil), r...), r...))
	f.Fuzz(func(t *testing.T, b []byte) {
		read := 0
		err := messages(b, func(_, _ uint16, _ uint32, body []byte) {
			read += unix.NLMSG_HDRLEN + len(body)
			Attrs(body, func(_ uint16, data []byte) {
				if len(data) > len(body) {
					t.Fatalf("an attribute of %d bytes in %d", len(data), len(body))
				}
			})
		})
		if read > len(b) || err == nil && len(b)-read >= unix.NLMSG_HDRLEN+unix.NLMSG_ALIGNTO*(read/unix.NLMSG_HDRLEN+1) {
			t.Errorf("%d of %d bytes were read: %v", read, len(b), err)
		}
	})
}
