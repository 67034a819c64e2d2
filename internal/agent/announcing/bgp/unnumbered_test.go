package bgp_test

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestUnnumbered speaks over a link of which nothing is known but the device: the sides find each other by Router Advertisements. FRR
// has the node by `neighbor bare1 interface`, for which it waits to hear of the node as the node does for it; BIRD takes whoever comes.
func TestUnnumbered(t *testing.T) {
	for name, newRouter := range routers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ns := newNamespace(t)
			r := newRouter(t, ns)
			n := newNode(t, ns, 1)
			for _, end := range []namespace{ns, n.namespace} {
				end.run("sysctl -qw net.ipv6.conf.default.addr_gen_mode=1") // no other link-local addresses than these
			}
			wire(t, ns, "bare1", []string{"fe80::1/64"}, n.namespace, "bare", []string{"fe80::2/64"})
			o := outside(t, ns)
			p := peer("::%bare", route("10.244.1.0/24"), route("fd00:244:1::/64"))
			p.Unnumbered = true
			at := func(router string) {
				t.Helper()
				testenv.Eventually(t, "the session is with "+router, func() (bool, string) {
					now, _ := n.told()
					return len(now.Sessions) == 1 && now.Sessions[0].State == bgp.Established && now.Sessions[0].Address.Addr().String() == router+"%bare", fmt.Sprint(now.Sessions)
				})
				ns.routes("fd00:244:1::/64", "fe80::2")
				ns.routes("10.244.1.0/24", "fe80::2")
			}
			n.begin()
			if done := n.set(p); done.Total() != 0 {
				t.Errorf("before a router was heard the changes are %+v", done)
			}
			session := routed{device: "bare1", unnumbered: true, extended: true}
			r.begin(session)
			at("fe80::1")
			losesNothing(ns, o, n, p)
			at("fe80::1")

			// The same router with another address.
			ns.run("ip addr add fe80::3/64 dev bare1 nodad")
			ns.run("ip addr del fe80::1/64 dev bare1")
			at("fe80::3")

			// Another router, after this one has died without a word.
			r.end(unix.SIGKILL)
			ns.run("ip link set bare1 down")
			ns.run("ip link set bare1 address 02:00:00:00:00:04")
			ns.run("ip link set bare1 up")
			ns.run("ip addr add fe80::4/64 dev bare1 nodad")
			r.begin(session)
			at("fe80::4")

			// Nodes send no more than that they are there.
			if routes := ns.run("ip -6 route show default"); routes != "" {
				t.Errorf("the router has default routes: %s", routes)
			}
			n.set()
			ns.routes("10.244.1.0/24")
			if sockets := n.run("ss -Hlwn"); strings.Contains(sockets, "ipv6-icmp") {
				t.Errorf("without a peer there is still a socket: %s", sockets)
			}
		})
	}
}
