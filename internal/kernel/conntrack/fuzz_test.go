package conntrack

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/testenv"
	"golang.org/x/sys/unix"
)

// What a kernel 6.18 tells of a flow to a Service and of the client's socket, of each family.
var (
	capturedEntries = [...]string{
		"020000003400018014000180080001000a60000a080002000a60000a1c000280050001001100000006000200ca81000006000300003500003400028014000180" +
			"080001000af40001080002000a60000a1c00028005000100110000000600020014b4000006000300ca81000008000300000001aa080008000000000008000c00" +
			"c6564ef708000b0000000001080007000000001d",
		"0a0000004c0001802c00018014000300fd00009600000000000000000000000a14000400fd00009600000000000000000000000a1c0002800500010011000000" +
			"06000200b553000006000300003500004c0002802c00018014000300fd00024400000000000000000000000114000400fd00009600000000000000000000000a" +
			"1c00028005000100110000000600020014b4000006000300b553000008000300000001aa080008000000000008000c0065a5898008000b000000000108000700" +
			"0000001d",
	}
	capturedSockets = [...]string{
		"02010000ca8100350a60000a0000000000000000000000000a60000a00000000000000000000000000000000e501000000000000000000000000000000000000" +
			"0000000091b21e01050008000000000008000f00000000000c00150001000000000000000600160050000000",
		"0a010000b5530035fd00009600000000000000000000000afd00009600000000000000000000000a00000000e601000000000000000000000000000000000000" +
			"0000000092b21e01050008000000000008000f00000000000c00150001000000000000000600160010000000",
	}
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	testenv.Must(t, err)
	return b
}

func TestParse(t *testing.T) {
	for i, want := range []Entry{
		{
			Protocol: service.UDP, Status: 0x1aa, Timeout: 29 * time.Second, ID: 0xc6564ef7,
			Original: Tuple{Source: at("10.96.0.10", 51841), Destination: at("10.96.0.10", 53)},
			Reply:    Tuple{Source: at("10.244.0.1", 5300), Destination: at("10.96.0.10", 51841)},
		},
		{
			Protocol: service.UDP, Status: 0x1aa, Timeout: 29 * time.Second, ID: 0x65a58980,
			Original: Tuple{Source: at("fd00:96::a", 46419), Destination: at("fd00:96::a", 53)},
			Reply:    Tuple{Source: at("fd00:244::1", 5300), Destination: at("fd00:96::a", 46419)},
		},
	} {
		body := unhex(t, capturedEntries[i])
		if got, err := parseEntry(body); err != nil || got != want {
			t.Errorf("%d: got %+v, %v, want %+v", i, got, err, want)
		}
		if got := testing.AllocsPerRun(10, func() { _, _ = parseEntry(body) }); got > 0 {
			t.Errorf("%d: reading an entry allocates %v times", i, got)
		}
		for size := range len(body) - 16 { // behind the number come a counter and the timeout
			if e, err := parseEntry(body[:size]); err == nil {
				t.Errorf("%d: cut off after %d bytes it is read as %s", i, size, e)
			}
		}
	}
	for i, want := range []string{"UDP 10.96.0.10:51841 > 10.96.0.10:53", "UDP [fd00:96::a]:46419 > [fd00:96::a]:53"} {
		got, err := parseSocket(service.UDP, unhex(t, capturedSockets[i]))
		if err != nil || got.String() != want || got.Cookie != uint64(0x1e5+i) {
			t.Errorf("%d: got %s, cookie %#x, %v, want %s", i, got, got.Cookie, err, want)
		}
	}
}

func FuzzEntry(f *testing.F) {
	for _, s := range capturedEntries {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		e, err := parseEntry(body)
		if err != nil {
			if e != (Entry{}) {
				t.Fatalf("both %v and %v", e, err)
			}
			return
		}
		r, err := deleteRequest(e)
		if err != nil {
			t.Fatal(err)
		}
		// What is deleted is what was listed: the request names the same answers, in the same words.
		var reply Tuple
		var id uint32
		if !nlmsg.Attrs(r[unix.NLMSG_HDRLEN+sizeofNfgenmsg:], func(kind uint16, data []byte) {
			switch kind {
			case ctaTupleReply:
				reply.parse(data)
			case ctaZone:
				reply.Zone = uint16(bigEndian(data, 2))
			case ctaID:
				id = bigEndian(data, 4)
			}
		}) || reply != e.Reply || id != e.ID {
			t.Fatalf("%+v is deleted as %+v, number %d", e, reply, id)
		}
	})
}

func FuzzSocket(f *testing.F) {
	for _, s := range capturedSockets {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := parseSocket(service.TCP, body)
		if (err != nil) != (s == Socket{}) {
			t.Fatalf("%s and %v", s, err)
		}
		if err == nil && !strings.Contains(string(destroyRequest(s)), string(s.id[:])) {
			t.Fatalf("%s is destroyed as another", s)
		}
	})
}
