package ruleset_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// setUplink sets u, and checks that setting it again changes nothing, also by a new Ruleset.
func setUplink(t *testing.T, r *ruleset.Ruleset, u ruleset.Uplink) {
	t.Helper()
	got, err := r.SetUplink(u)
	testenv.Must(t, err)
	if got != (diff.Count{Added: 1}) {
		t.Errorf("changed %+v", got)
	}
	if again, err := r.SetUplink(u); err != nil || again != (diff.Count{}) {
		t.Errorf("the second time changes %+v, %v", again, err)
	}
}

// TestUplinkGuard sends packets between a lab, a host, and a network behind the host.
func TestUplinkGuard(t *testing.T) {
	host, r := space(t)
	lab, internet := linktest.Namespace(t), linktest.Namespace(t)
	addrs := func(n *link.Namespace, device string, prefixes ...string) {
		t.Helper()
		var all []netip.Prefix
		for _, p := range prefixes {
			all = append(all, netip.MustParsePrefix(p))
		}
		testenv.Must(t, n.SetAddrs(device, all))
	}
	testenv.Must(t, host.SetPair(link.Device{Name: "up", Alias: "x"}, lab, link.Device{Name: "uplink", Alias: "x"}))
	testenv.Must(t, host.SetPair(link.Device{Name: "out", Alias: "x"}, internet, link.Device{Name: "eth0", Alias: "x"}))
	addrs(lab, "uplink", "10.1.0.2/24", "fd01::2/64")
	addrs(host, "up", "10.1.0.1/24", "fd01::1/64")
	addrs(host, "out", "192.0.2.1/24", "fd02::1/64", "192.0.2.9/24") // the last is a published port's
	addrs(internet, "eth0", "192.0.2.2/24", "fd02::2/64")
	for n, via := range map[*link.Namespace][2]string{lab: {"10.1.0.1", "fd01::1"}, internet: {"192.0.2.1", "fd02::1"}} {
		linktest.Run(t, n, "ip", "route", "add", "default", "via", via[0])
		linktest.Run(t, n, "ip", "-6", "route", "add", "default", "via", via[1])
	}
	testenv.Must(t, host.Sysctl("ipv4/ip_forward", "1"))
	testenv.Must(t, host.Sysctl("ipv6/conf/all/forwarding", "1"))
	linktest.Run(t, host, "nft", "add table ip docker; add chain ip docker pre { type nat hook prerouting priority dstnat; }; "+
		"add rule ip docker pre ip daddr 192.0.2.9 dnat to 192.0.2.2")

	m := ruleset.Uplink{Table: "fathom-test", Comment: "x", Inside: "up", From: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}}
	for _, guard := range []bool{false, true, false} {
		m.Guard = guard
		setUplink(t, r, m)
		for _, tc := range []struct {
			what string
			from *link.Namespace
			to   string
			want bool
		}{
			{"the uplink's address", lab, "10.1.0.1", !guard},
			{"another address of the host", lab, "192.0.2.1", !guard},
			{"a port that the host leads elsewhere", lab, "192.0.2.9", !guard},
			{"the uplink's IPv6 address", lab, "fd01::1", !guard},
			{"another IPv6 address of the host", lab, "fd02::1", !guard},
			{"everybody on the uplink", lab, "ff02::1%uplink", !guard},
			{"the internet", lab, "192.0.2.2", true},
			{"the IPv6 internet", lab, "fd02::2", true},
			{"the lab, from the host", host, "10.1.0.2", true},
			{"the lab, from the host, IPv6", host, "fd01::2", true},
		} {
			patience := "1"
			if tc.want {
				patience = "10" // returns with the first answer; neighbours are looked up first
			}
			out, err := linktest.Try(tc.from, "ping", "-c1", "-w"+patience, "-n", tc.to)
			if (err == nil) != tc.want {
				t.Errorf("guard %v: %s (%s) is reached: %v, want %v\n%s", guard, tc.what, tc.to, err == nil, tc.want, out)
			}
		}
	}
	m.Guard = true
	setUplink(t, r, m)
	got := linktest.Run(t, host, "nft", "list", "table", "inet", "fathom-test")
	for _, want := range []string{
		"type filter hook prerouting priority mangle",
		`iifname "up" ct state established,related accept`,
		`iifname "up" icmpv6 type 133-137 accept`,
		`iifname "up" fib daddr type != unicast drop`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("want %q in\n%s", want, got)
		}
	}
}

func TestUplink(t *testing.T) {
	n, r := space(t)
	m := ruleset.Uplink{Table: "fathom-test", Comment: "what it is for", Inside: "uplink",
		From: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/48")},
		To:   []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16"), netip.MustParsePrefix("fd01::/48")}}
	for _, tc := range []struct {
		outside bool
		want    []string
	}{
		{false, []string{`ip saddr 10.1.0.0/16 oifname != "uplink" masquerade comment "what it is for"`, `ip6 saddr fd00::/48 oifname != "uplink" masquerade`}},
		{true, []string{`oifname "uplink" ip saddr 10.1.0.0/16 accept`, `oifname "uplink" ip6 saddr fd00::/48 accept`, `oifname "uplink" masquerade`}},
	} {
		m.Outside = tc.outside
		setUplink(t, r, m)
		got := linktest.Run(t, n, "nft", "list", "ruleset")
		for _, want := range append(tc.want, `ip daddr 10.2.0.0/16 accept`, `ip6 daddr fd01::/48 accept`) {
			if strings.Count(got, want) != 1 {
				t.Errorf("outside=%v: want once %q in\n%s", tc.outside, want, got)
			}
		}
	}
	for range 2 {
		testenv.Must(t, r.Delete("fathom-test"))
	}
	if got := linktest.Run(t, n, "nft", "list", "ruleset"); got != "" {
		t.Errorf("left behind:\n%s", got)
	}
}
