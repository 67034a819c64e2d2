package link_test

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/podlink"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func addrs(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, s := range list {
		all = append(all, netip.MustParseAddr(s))
	}
	return all
}

func TestSetNodeCacheAddrs(t *testing.T) {
	node, pod := linktest.Namespace(t), linktest.Namespace(t)
	testenv.Must(t, node.SetUp("lo", true))
	linktest.Run(t, node, "ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
	linktest.Run(t, node, "ip", "addr", "add", "2001:db8::1/128", "dev", "lo", "nodad")
	p := podlink.Pod{
		Device: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 1, 1}, HostDevice: "a-1", HostMAC: net.HardwareAddr{2, 0, 0, 0, 2, 1},
		Alias: "fathom pod default/a-1 eth0", MTU: 1400, Addrs: addrs("10.1.0.2", "fd00::2"), Sources: addrs("192.0.2.1", "2001:db8::1"),
	}
	testenv.Must(t, podlink.Add(node, pod, p))
	set := func(want int, list ...string) {
		t.Helper()
		if changed, err := node.SetNodeCacheAddrs(addrs(list...)); err != nil || changed != want {
			t.Errorf("%d changes, %v; want %d", changed, err, want)
		}
	}
	both := []string{"fd66:6174:686f:6d::a", "169.254.20.10"}
	set(2, both...)
	set(0, both...)
	for _, to := range both {
		linktest.Run(t, pod, "ping", "-c1", "-W5", to)
	}
	linktest.Run(t, node, "ip", "addr", "del", "169.254.20.10/32", "dev", "lo")
	set(1, both...)
	set(1, "169.254.20.10")
	set(1)
	if got := linktest.Run(t, node, "ip", "addr", "show", "dev", "lo"); !strings.Contains(got, "192.0.2.1") || strings.Contains(got, "169.254") || strings.Contains(got, "fd66") {
		t.Errorf("left over or taken away:\n%s", got)
	}
}

func TestSetNodeCacheAddrsWithoutIPv6(t *testing.T) {
	node := linktest.Namespace(t)
	linktest.Run(t, node, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
	if changed, err := node.SetNodeCacheAddrs(addrs("fd66:6174:686f:6d::a", "169.254.20.10")); err != nil || changed != 1 {
		t.Errorf("%d changes, %v; want 1", changed, err)
	}
}
