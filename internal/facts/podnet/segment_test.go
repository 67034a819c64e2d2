package podnet_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/podnet"
)

func TestOn(t *testing.T) {
	segments := podnet.Segments([]podnet.Interface{
		{Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.2/25")}},
		{Name: "eth1", Addrs: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64")}},
	})
	for addr, want := range map[string]string{"192.0.2.80": "[eth0]", "2001:db8::9": "[eth1]", "198.51.100.1": "[]"} {
		if got := fmt.Sprint(podnet.On(netip.MustParseAddr(addr), segments)); got != want {
			t.Errorf("%s is on %s, want %s", addr, got, want)
		}
	}
}
