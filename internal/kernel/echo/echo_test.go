package echo_test

import (
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/ping"
	"github.com/fathom-network/fathom/internal/kernel/echo"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// Two namespaces with a wire whose far end takes packets of 1400 bytes only.
func TestProbe(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	if err := a.SetPair(link.Device{Name: "a0", MTU: 1500}, b, link.Device{Name: "b0", MTU: 1500}); err != nil {
		t.Fatal(err)
	}
	for n, addrs := range map[*link.Namespace][]string{a: {"192.0.2.1/24", "2001:db8::1/64"}, b: {"192.0.2.2/24", "2001:db8::2/64"}} {
		name := map[*link.Namespace]string{a: "a0", b: "b0"}[n]
		if err := n.SetAddrs(name, []netip.Prefix{netip.MustParsePrefix(addrs[0]), netip.MustParsePrefix(addrs[1])}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := echo.Listen(b)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := func(addr string, size int) ping.Probe {
		return ping.Probe{From: "a", To: netip.AddrPortFrom(netip.MustParseAddr(addr), l.Port), Size: size, MTU: 1500}
	}
	probes := []ping.Probe{
		to("192.0.2.2", 100), to("192.0.2.2", 1500), to("192.0.2.2", 4000),
		to("2001:db8::2", 200), to("2001:db8::2", 1500), to("2001:db8::2", 4000),
	}
	for i, r := range echo.Send(map[string]*link.Namespace{"a": a}, probes) {
		want := "192.0.2.1"
		if i >= 3 {
			want = "2001:db8::1"
		}
		if r.Error != "" || r.Source.String() != want || r.Seconds <= 0 {
			t.Errorf("%+v", r)
		}
	}

	tooLarge, refused := to("192.0.2.2", 1600), to("192.0.2.2", 100)
	tooLarge.MTU, refused.To = 1600, netip.MustParseAddrPort("192.0.2.2:9")
	nowhere, unknown := to("198.51.100.1", 100), to("192.0.2.2", 100)
	unknown.From = "nobody"
	got := echo.Send(map[string]*link.Namespace{"a": a}, []ping.Probe{tooLarge, refused, nowhere, unknown})
	for i, want := range []string{"too large for a link on the way", "refused: nobody listens at the other end",
		"unreachable: there is no route", "there is no namespace of nobody here"} {
		if got[i].Error != want {
			t.Errorf("%q, want %q", got[i].Error, want)
		}
	}
}
