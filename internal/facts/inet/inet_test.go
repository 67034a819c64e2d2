package inet_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

func TestFamily(t *testing.T) {
	for addr, want := range map[string]string{"192.0.2.1": "IPv4", "fd00::1": "IPv6"} {
		if got := inet.FamilyOf(netip.MustParseAddr(addr)).String(); got != want {
			t.Errorf("%s is %s, want %s", addr, got, want)
		}
	}
}

func TestLast(t *testing.T) {
	for prefix, want := range map[string]string{
		"10.0.0.0/8": "10.255.255.255", "10.1.2.3/25": "10.1.2.127", "10.1.2.3/32": "10.1.2.3", "0.0.0.0/0": "255.255.255.255",
		"fd00::/62": "fd00::3:ffff:ffff:ffff:ffff", "fd00::7/128": "fd00::7",
	} {
		if got := inet.Last(netip.MustParsePrefix(prefix)).String(); got != want {
			t.Errorf("the last address of %s is %s, want %s", prefix, got, want)
		}
	}
}

func TestDisjoint(t *testing.T) {
	for list, want := range map[string]string{
		"":                        "",
		"10.2.0.0/16 10.1.0.0/16": "10.1.0.0/16 10.2.0.0/16",
		"10.1.2.0/24 10.1.0.0/16 10.1.3.0/24 10.0.0.0/16 10.1.0.0/16": "10.0.0.0/16 10.1.0.0/16",
		"fd00:1::/32 10.0.0.9/8 fd00:1:2::/48":                        "10.0.0.0/8 fd00:1::/32",
	} {
		var prefixes []netip.Prefix
		for _, word := range strings.Fields(list) {
			prefixes = append(prefixes, netip.MustParsePrefix(word))
		}
		before := fmt.Sprint(prefixes)
		if got := strings.Trim(fmt.Sprint(inet.Disjoint(prefixes)), "[]"); got != want {
			t.Errorf("%s: %s, want %s", list, got, want)
		}
		if fmt.Sprint(prefixes) != before {
			t.Errorf("%s was changed to %v", before, prefixes)
		}
	}
}

func TestPrefixes(t *testing.T) {
	for _, c := range []struct{ first, last, want string }{
		{"10.0.0.0", "10.0.0.255", "[10.0.0.0/24]"},
		{"10.0.0.1", "10.0.0.6", "[10.0.0.1/32 10.0.0.2/31 10.0.0.4/31 10.0.0.6/32]"},
		{"0.0.0.0", "255.255.255.255", "[0.0.0.0/0]"},
		{"255.255.255.254", "255.255.255.255", "[255.255.255.254/31]"},
		{"::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "[::/0]"},
		{"fd00::ffff", "fd00::1:0", "[fd00::ffff/128 fd00::1:0/128]"},
		{"10.0.0.2", "10.0.0.1", "[]"},
	} {
		if got := fmt.Sprint(inet.Prefixes(netip.MustParseAddr(c.first), netip.MustParseAddr(c.last))); got != c.want {
			t.Errorf("%s to %s: %s, want %s", c.first, c.last, got, c.want)
		}
	}
}
