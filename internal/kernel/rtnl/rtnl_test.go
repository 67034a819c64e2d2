package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
)

// fakeKernel answers each datagram that rtnl sends with the datagrams that answer returns, n being the how-manyeth
// it is.
func fakeKernel(t *testing.T, answer func(n int, requests []nlmsg.Request) [][]byte) *Conn {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		b := make([]byte, 1<<20)
		for n := 0; ; n++ {
			size, err := unix.Read(pair[1], b)
			if err != nil || size == 0 {
				return
			}
			var requests []nlmsg.Request
			for rest := b[:size]; len(rest) > 0; {
				length := binary.NativeEndian.Uint32(rest)
				requests, rest = append(requests, nlmsg.Request(rest[:length])), rest[length:]
			}
			for _, d := range answer(n, requests) {
				_, _ = unix.Write(pair[1], d)
			}
		}
	}()
	t.Cleanup(func() {
		unix.Close(pair[0])
		<-done
		unix.Close(pair[1])
	})
	return &Conn{fd: pair[0], buf: make([]byte, 1<<16)}
}

func seqOf(r nlmsg.Request) uint32 { return binary.NativeEndian.Uint32(r[8:]) }

// message makes what a kernel would send.
func message(kind, flags uint16, seq uint32, body ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, seq)
	return append(append(b, 0, 0, 0, 0), body...)
}

func errno(e unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(-int32(e))) }

func TestDumpIsRepeated(t *testing.T) {
	for name, first := range map[string]func(seq uint32) [][]byte{
		"flag on an item": func(seq uint32) [][]byte {
			return [][]byte{message(99, unix.NLM_F_DUMP_INTR, seq, 'o', 'l', 'd', 0), message(unix.NLMSG_DONE, 0, seq, errno(0)...)}
		},
		"flag at the end": func(seq uint32) [][]byte {
			return [][]byte{message(99, 0, seq, 'o', 'l', 'd', 0), message(unix.NLMSG_DONE, unix.NLM_F_DUMP_INTR, seq, errno(0)...)}
		},
		"EINTR": func(seq uint32) [][]byte {
			return [][]byte{message(99, 0, seq, 'o', 'l', 'd', 0), message(unix.NLMSG_DONE, 0, seq, errno(unix.EINTR)...)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := fakeKernel(t, func(n int, requests []nlmsg.Request) [][]byte {
				seq := seqOf(requests[0])
				if n == 0 {
					return first(seq)
				}
				return [][]byte{message(99, 0, seq-1, 'l', 'a', 't', 'e'), message(99, 0, seq, 'n', 'e', 'w', 0), message(unix.NLMSG_DONE, 0, seq, errno(0)...)}
			})
			var got []string
			err := c.Dump(nlmsg.New(unix.RTM_GETROUTE, 0, make([]byte, 12)), func(restart bool, b []byte) {
				if restart {
					got = nil
					return
				}
				got = append(got, string(b[:3]))
			})
			if err != nil || !slices.Equal(got, []string{"new"}) {
				t.Errorf("got %v, %v; want what the second dump said", got, err)
			}
		})
	}
}

func TestDumpFails(t *testing.T) {
	for name, tc := range map[string]struct {
		answer func(seq uint32) []byte
		want   error
	}{
		"refused": {func(seq uint32) []byte { return message(unix.NLMSG_ERROR, 0, seq, errno(unix.EPERM)...) }, unix.EPERM},
		"cut off": {func(seq uint32) []byte { return message(99, 0, seq, 1, 2, 3, 4)[:18] }, nil},
	} {
		c := fakeKernel(t, func(_ int, requests []nlmsg.Request) [][]byte { return [][]byte{tc.answer(seqOf(requests[0]))} })
		err := c.Dump(nlmsg.New(unix.RTM_GETROUTE, 0, make([]byte, 12)), func(bool, []byte) {})
		if err == nil || tc.want != nil && !errors.Is(err, tc.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestExecute sends more than fits one datagram, and has every tenth request fail.
func TestExecute(t *testing.T) {
	var sent atomic.Int32 // by the kernel's goroutine, and read here
	c := fakeKernel(t, func(_ int, requests []nlmsg.Request) [][]byte {
		var answers [][]byte
		for i, r := range requests {
			acked := binary.NativeEndian.Uint16(r[6:])&unix.NLM_F_ACK != 0
			if acked != (i == len(requests)-1) {
				t.Errorf("request %d of %d: acknowledgement asked for: %v", i, len(requests), acked)
			}
			switch {
			case sent.Load()%10 == 3:
				answers = append(answers, message(unix.NLMSG_ERROR, 0, seqOf(r), errno(unix.EEXIST)...))
			case acked:
				answers = append(answers, message(unix.NLMSG_ERROR, 0, seqOf(r), errno(0)...))
			}
			sent.Add(1)
		}
		return answers
	})
	var requests []nlmsg.Request
	for range 2000 {
		requests = append(requests, nlmsg.New(unix.RTM_NEWROUTE, 0, make([]byte, 12)).Attr(1, make([]byte, 60)))
	}
	var failed []int
	if err := c.Execute(requests, func(i int, err error) {
		if !errors.Is(err, unix.EEXIST) {
			t.Error(err)
		}
		failed = append(failed, i)
	}); err != nil {
		t.Fatal(err)
	}
	var want []int
	for i := 3; i < 2000; i += 10 {
		want = append(want, i)
	}
	if n := sent.Load(); n != 2000 || fmt.Sprint(failed) != fmt.Sprint(want) {
		t.Errorf("sent %d, failed %v, want %v", n, failed, want)
	}
}
