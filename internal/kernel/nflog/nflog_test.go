package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nlmsg"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// ip4 and ip6 are packets from and to documentation's addresses, with what follows the header.
func ip4(protocol uint8, fragment uint16, more ...byte) []byte {
	b := []byte{0x45, 0, 0, 0, 0, 0, byte(fragment >> 8), byte(fragment), 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2}
	return append(b, more...)
}

func ip6(next uint8, more ...byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, 0, next, 64}
	for _, s := range []string{"2001:db8::1", "2001:db8::2"} {
		b = append(b, netip.MustParseAddr(s).AsSlice()...)
	}
	return append(b, more...)
}

func message(prefix string, number uint32, payload []byte) []byte {
	r := nlmsg.New(msgPacket, 0, []byte{unix.AF_INET, 0, 0, 0}).Attr(attrPrefix, append([]byte(prefix), 0)).
		Attr(attrNumber, binary.BigEndian.AppendUint32(nil, number)).Attr(attrPayload, payload)
	return r[unix.NLMSG_HDRLEN:]
}

func TestParse(t *testing.T) {
	a4, b4 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	a6, b6 := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	ports := []byte{0x12, 0x34, 0, 80}
	for name, c := range map[string]struct {
		payload []byte
		want    Packet // without its prefix; the zero value is an error
	}{
		"TCP":                             {ip4(6, 0, ports...), Packet{From: a4, To: b4, Protocol: 6, SourcePort: 0x1234, Port: 80}},
		"UDP, the first fragment":         {ip4(17, 0x2000, ports...), Packet{From: a4, To: b4, Protocol: 17, SourcePort: 0x1234, Port: 80}},
		"UDP, a later one":                {ip4(17, 0x2001, ports...), Packet{From: a4, To: b4, Protocol: 17}},
		"ICMP has no ports":               {ip4(1, 0, ports...), Packet{From: a4, To: b4, Protocol: 1}},
		"cut off in the ports":            {ip4(6, 0, ports[:3]...), Packet{From: a4, To: b4, Protocol: 6}},
		"cut off in the header":           {ip4(6, 0)[:19], Packet{}},
		"a header that says it is longer": {append([]byte{0x4f}, ip4(6, 0, ports...)[1:]...), Packet{}},
		"a header that says it is none":   {append([]byte{0x40}, ip4(6, 0, ports...)[1:]...), Packet{}},
		"no IP":                           {[]byte{0x10, 0}, Packet{}},
		"nothing":                         {nil, Packet{}},
		"IPv6":                            {ip6(132, ports...), Packet{From: a6, To: b6, Protocol: 132, SourcePort: 0x1234, Port: 80}},
		"IPv6 with extensions":            {ip6(0, append(append([]byte{60, 0, 0, 0, 0, 0, 0, 0, 6, 1}, make([]byte, 14)...), ports...)...), Packet{From: a6, To: b6, Protocol: 6, SourcePort: 0x1234, Port: 80}},
		"IPv6, the first fragment":        {ip6(44, append([]byte{17, 0, 0, 1, 0, 0, 0, 0}, ports...)...), Packet{From: a6, To: b6, Protocol: 17, SourcePort: 0x1234, Port: 80}},
		"IPv6, a later one":               {ip6(44, append([]byte{17, 0, 0, 8, 0, 0, 0, 0}, ports...)...), Packet{From: a6, To: b6, Protocol: 17}},
		"IPv6, extensions to the end":     {ip6(0, 60, 255, 0), Packet{From: a6, To: b6, Protocol: 0}},
		"IPv6, cut off":                   {ip6(6)[:39], Packet{}},
	} {
		p, number, err := parse(message("x", 7, c.payload))
		want := c.want
		if want.From.IsValid() {
			want.Prefix = "x"
		}
		if p != want || number != 7 || (err == nil) != want.From.IsValid() {
			t.Errorf("%s: %+v, number %d, %v; want %+v", name, p, number, err, want)
		}
	}
	if _, _, err := parse([]byte{1, 2}); err == nil {
		t.Error("a message that is cut off is read")
	}
}

// FuzzParse: what a rule logs comes from anywhere; exactly one of packet and error comes of it.
func FuzzParse(f *testing.F) {
	for _, payload := range [][]byte{ip4(6, 0, 1, 2, 3, 4), ip4(17, 0x2001), ip6(6, 1, 2, 3, 4), ip6(0, 43, 0, 0, 0, 0, 0, 0, 0, 51, 1), ip6(44, 6, 0, 0, 0), ip6(51, 51, 255), nil} {
		f.Add(message("fathom-policy denied egress", 1, payload))
	}
	f.Add([]byte{0, 0, 0, 0, 4, 0, attrPrefix, 0, 4, 0, attrPayload, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, _, err := parse(b)
		if (err == nil) != (p.From.IsValid() && p.To.IsValid()) || err != nil && p != (Packet{}) {
			t.Errorf("%+v, %v", p, err)
		}
	})
}

// TestRead logs packets in a namespace and reads them.
func TestRead(t *testing.T) {
	testenv.NeedRoot(t)
	n := linktest.Namespace(t)
	linktest.Run(t, n, "ip", "link", "set", "lo", "up")
	const group = 4242
	const rules = "add table inet t; add chain inet t c { type filter hook output priority 0; }; add rule inet t c udp dport 5300 log prefix \"one two\" group 4242 snaplen 96"
	linktest.Run(t, n, "nft", rules)
	r, err := Open(n.Path(), group, 96)
	testenv.Must(t, err)
	defer r.Close()
	if again, err := Open(n.Path(), group, 96); !errors.Is(err, ErrTaken) {
		t.Errorf("a second reader: %v, %v", again, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	packets := make(chan Packet, 100)
	done := make(chan error)
	go func() {
		done <- r.Run(ctx, func(p Packet) { packets <- p }, func(n int) { t.Errorf("%d are lost", n) })
	}()
	send(t, n, "127.0.0.1:5300", 3)
	for range 3 {
		got := <-packets
		want := Packet{Prefix: "one two", From: netip.MustParseAddr("127.0.0.1"), To: netip.MustParseAddr("127.0.0.1"), Protocol: 17, SourcePort: got.SourcePort, Port: 5300}
		if got != want || got.SourcePort == 0 {
			t.Errorf("read %+v, want %+v", got, want)
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestLost: what a reader does not read in time is counted.
func TestLost(t *testing.T) {
	testenv.NeedRoot(t)
	n := linktest.Namespace(t)
	linktest.Run(t, n, "ip", "link", "set", "lo", "up")
	linktest.Run(t, n, "nft", "add table inet t; add chain inet t c { type filter hook output priority 0; }; add rule inet t c udp dport 5300 log group 4243 snaplen 96")
	r, err := Open(n.Path(), 4243, 96)
	testenv.Must(t, err)
	defer r.Close()
	const all = 60_000
	send(t, n, "127.0.0.1:5300", all)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var sender sync.WaitGroup
	defer sender.Wait()
	sender.Go(func() {
		for ctx.Err() == nil { // once the queue has room again, numbers go on
			send(t, n, "127.0.0.1:5300", 1)
		}
	})
	read, lost := 0, 0
	err = r.Run(ctx, func(Packet) { read++ }, func(n int) {
		lost += n
		cancel()
	})
	if lost == 0 || lost >= all || read == 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("read %d, lost %d of %d, %v", read, lost, all, err)
	}
}

func send(t *testing.T, n *link.Namespace, to string, times int) {
	t.Helper()
	if err := n.Do(func() error {
		c, err := net.ListenUDP("udp4", nil) // not connected, so that nobody's answers end it
		if err != nil {
			return err
		}
		defer c.Close()
		for range times {
			if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort(to)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}
