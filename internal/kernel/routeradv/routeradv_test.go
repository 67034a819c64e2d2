package routeradv_test

import (
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/routeradv"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestListener has two nodes and a host on a segment: nodes are no routers to each other, nor to the host.
func TestListener(t *testing.T) {
	wire := linktest.Namespace(t)
	testenv.Must(t, wire.SetBridge(link.Device{Name: "br0", Alias: "test"}))
	attach := func(i int) *link.Namespace {
		n := linktest.Namespace(t)
		testenv.Must(t, n.Sysctl("ipv6/conf/default/accept_dad", "0"))
		testenv.Must(t, n.Sysctl("ipv6/conf/default/accept_ra", "2"))
		testenv.Must(t, wire.SetPair(link.Device{Name: fmt.Sprint("p", i), Alias: "test", Bridge: "br0"}, n, link.Device{Name: "eth0", Alias: "test"}))
		return n
	}
	host := attach(0)
	var calls atomic.Int32
	listen := func(i int) (*link.Namespace, *routeradv.Listener) {
		n := attach(i)
		l := routeradv.New(n, slog.New(slog.NewTextHandler(t.Output(), nil)), func() { calls.Add(1) })
		t.Cleanup(l.Close)
		return n, l
	}
	node, one := listen(1)
	_, two := listen(2)
	one.Set([]string{"eth0", "eth9"})
	two.Set([]string{"eth0"})
	if h := one.Heard(); len(h) != 2 || !strings.Contains(h["eth9"].Problem, "no such device") || h["eth0"].Since.IsZero() {
		t.Errorf("%+v", h)
	}
	counted := func(n *link.Namespace, name string) string {
		for line := range strings.Lines(linktest.Run(t, n, "nstat", "-asz", name)) {
			if w := strings.Fields(line); len(w) > 1 && w[0] == name {
				return w[1]
			}
		}
		return ""
	}
	for _, n := range []*link.Namespace{node, host} {
		testenv.Eventually(t, "both, or the one, were heard by the kernel", func() (bool, string) {
			c := counted(n, "Icmp6InRouterAdvertisements")
			return c != "0", c
		})
		if routes := linktest.Run(t, n, "ip", "-6", "route", "show", "default"); routes != "" {
			t.Errorf("there is a default route: %s", routes)
		}
	}
	if h := one.Heard()["eth0"]; h.Router.IsValid() || calls.Load() != 0 || h.Problem != "" {
		t.Errorf("%+v, %d calls", h, calls.Load())
	}

	// A device that goes, and is made anew.
	linktest.Run(t, node, "ip", "link", "del", "eth0")
	one.Set([]string{"eth0"})
	if h := one.Heard()["eth0"]; !strings.Contains(h.Problem, "no such device") {
		t.Errorf("%+v", h)
	}
	testenv.Must(t, wire.SetPair(link.Device{Name: "p1", Alias: "test", Bridge: "br0"}, node, link.Device{Name: "eth0", Alias: "test"}))
	one.Set([]string{"eth0"})
	if h := one.Heard()["eth0"]; h.Since.IsZero() {
		t.Errorf("%+v", h)
	}
	linktest.Run(t, node, "ip", "-6", "addr", "flush", "dev", "eth0")
	testenv.Eventually(t, "it is told that there is no address to send from", func() (bool, string) {
		h := one.Heard()["eth0"]
		return strings.Contains(h.Problem, "no link-local address"), fmt.Sprintf("%+v", h)
	})
	one.Set(nil)
	if sockets := linktest.Run(t, node, "ss", "-Hlwn"); sockets != "" {
		t.Errorf("there is still a socket: %s", sockets)
	}
}
