package link_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func TestNeighbourMAC(t *testing.T) {
	a, b := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, a.SetPair(link.Device{Name: "a0", Alias: "test"}, b, link.Device{Name: "b0", Alias: "test"}))
	testenv.Must(t, a.SetAddrs("a0", []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}))
	linktest.Run(t, a, "ip", "neigh", "add", "192.0.2.2", "lladdr", "02:00:00:00:00:02", "dev", "a0", "nud", "permanent")
	linktest.Run(t, a, "ip", "neigh", "add", "2001:db8::2", "lladdr", "02:00:00:00:00:06", "dev", "a0", "nud", "permanent")
	for addr, want := range map[string]string{"192.0.2.2": "02:00:00:00:00:02", "2001:db8::2": "02:00:00:00:00:06", "192.0.2.3": ""} {
		mac, err := a.NeighbourMAC("a0", netip.MustParseAddr(addr))
		if err != nil || mac.String() != want {
			t.Errorf("of %s it knows %v, %v; want %q", addr, mac, err, want)
		}
	}
	if _, err := a.NeighbourMAC("a9", netip.MustParseAddr("192.0.2.2")); err == nil || !strings.Contains(err.Error(), "a9") {
		t.Errorf("of a device that is not there: %v", err)
	}
}
