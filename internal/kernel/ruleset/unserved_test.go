package ruleset_test

import (
	"fmt"
	"net/netip"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func ips(format string, numbers ...int) (all []netip.Addr) {
	for _, n := range numbers {
		all = append(all, netip.MustParseAddr(fmt.Sprintf(format, n)))
	}
	return all
}

func TestSetUnserved(t *testing.T) {
	n, path := linktest.NamespaceAt(t)
	r, err := ruleset.Open(path)
	testenv.Must(t, err)
	defer r.Close()
	anew, err := ruleset.Open(path) // a Ruleset that has set nothing itself
	testenv.Must(t, err)
	defer anew.Close()
	if held, found, err := anew.Unserved(nil); found || err != nil {
		t.Errorf("before there is a table: %+v, %v", held, err)
	}
	u := service.Unserved{Ranges: prefixes("10.96.0.0/16", "fd00:10:96::/112"), LoadBalancers: ips("198.51.100.%d", 1, 2), Others: ips("fd00:10:96::%d", 7), Node: ips("192.0.2.%d", 10)}
	check := func(what string, u service.Unserved, want diff.Count) {
		t.Helper()
		for _, want := range []diff.Count{want, {}} {
			if got, err := r.SetUnserved(u); err != nil || got != want {
				t.Errorf("%s: changed %+v, %v, want %+v", what, got, err, want)
			}
			if held, found, err := anew.Unserved(u.Node); err != nil || !found || !reflect.DeepEqual(held, service.UnservedAsHeld(u)) {
				t.Errorf("%s: held is %+v, %t, %v", what, held, found, err)
			}
		}
	}
	check("at first", u, diff.Count{Added: 1})
	isGolden(t, n, service.UnservedTable, "testdata/unserved.nft")
	more := u
	more.LoadBalancers = ips("198.51.100.%d", 1, 2, 3)
	check("an address more", more, diff.Count{Added: 2}) // one element of each set
	within := u
	within.LoadBalancers = ips("10.96.0.%d", 9)
	check("an address within a range", within, diff.Count{Added: 1, Removed: 6})
	check("as before", u, diff.Count{Added: 4, Removed: 1})
	moved := u
	moved.Node = ips("192.0.2.%d", 11)
	check("the node has another address", moved, diff.Count{Added: 1})
	check("and the one before", u, diff.Count{Added: 1})
	for drift, count := range map[string]diff.Count{
		"flush chain inet T prerouting":                     {Added: 1},
		"add element inet T services4 { 203.0.113.0/24 }":   {Removed: 1},
		"delete element inet T others6 { fd00:10:96::7 }":   {Added: 1},
		"insert rule inet T refuse accept comment \"ours\"": {Added: 1},
		"delete table inet T":                               {Added: 1},
	} {
		nft(t, n, strings.ReplaceAll(drift, " T", " "+service.UnservedTable))
		if held, found, err := anew.Unserved(u.Node); err != nil || found && reflect.DeepEqual(held, service.UnservedAsHeld(u)) {
			t.Errorf("%s: held is %+v, %v", drift, held, err)
		}
		check(drift, u, count)
	}
}

// TestUnservedWithPackets sends to addresses and ports of no Service, from a pod, from the node and from outside.
func TestUnservedWithPackets(t *testing.T) {
	l := newLab(t)
	const web, local, other, none, unknown = 1, 77, 78, 99, 9
	var all []service.Frontend
	u := service.Unserved{Ranges: prefixes("10.96.0.0/16", "fd00:10:96::/112")}
	for _, f := range families {
		for _, protocol := range []string{"/TCP", "/UDP"} {
			all = append(all,
				frontend("web", host(fmt.Sprintf(f.vip, web), 80)+protocol, service.ClusterIP, to(host(f.a, 8080))),
				frontend("web", host(fmt.Sprintf(f.lb, web), 80)+protocol, service.LoadBalancer, to(host(f.a, 8080))))
		}
		u.LoadBalancers = append(u.LoadBalancers, ips(f.lb, web)...)
		u.Others = append(u.Others, ips(f.vip, other)...)
		u.Node = append(u.Node, netip.MustParseAddr(f.node))
		at := netip.MustParseAddr(fmt.Sprintf(f.vip, local))
		ip(t, l.node, fmt.Sprintf("addr add %s/%d dev lo nodad", at, at.BitLen()))
		serve(t, l.node, netip.AddrPortFrom(at, 80))
	}
	// As on our nodes, the pods' devices have no address, and pods have a permanent neighbour entry for the gateway.
	mac := strings.Fields(linktest.Run(t, l.node, "sh", "-c", "ip -o link show dev b | sed 's/.*link.ether//'"))[0]
	ip(t, l.b, "neigh replace 169.254.1.1 lladdr "+mac+" dev eth0")
	ip(t, l.node, "addr del 169.254.1.1/32 dev b", "route replace 10.244.1.3 dev b") // the kernel removes routes with the last address
	set(t, l.rules, plan(all...))
	_, err := l.rules.SetUnserved(u)
	testenv.Must(t, err)
	ping := func(n *link.Namespace, to string) error {
		cmd := exec.Command("ping", "-c1", "-W1", to)
		testenv.Must(t, n.Start(cmd))
		return cmd.Wait()
	}
	for _, f := range families {
		vip := func(n, port int) string { return host(fmt.Sprintf(f.vip, n), port) }
		lb := func(n, port int) string { return host(fmt.Sprintf(f.lb, n), port) }
		for name, from := range map[string]*link.Namespace{"a pod": l.b, "the node": l.node, "outside": l.out} {
			t.Run(name+" "+f.network, func(t *testing.T) {
				for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
					for _, to := range []string{vip(web, 80), lb(web, 80), vip(local, 80)} {
						if server, _, err := ask(from, network, "", to, patience); err != nil {
							t.Errorf("%s to %s: %s, %v", network, to, server, err)
						}
					}
					isRefused(t, from, network, vip(web, 81))
					isRefused(t, from, network, vip(none, 80))
					isRefused(t, from, network, lb(web, 81))
					hears(t, from, network, "", vip(other, 80))
					hears(t, from, network, "", lb(unknown, 80))
				}
				if err := ping(from, fmt.Sprintf(f.lb, web)); err != nil {
					t.Errorf("ping of a load balancer's address: %v", err)
				}
				for _, to := range []string{fmt.Sprintf(f.lb, unknown), fmt.Sprintf(f.vip, web)} {
					if ping(from, to) == nil {
						t.Errorf("somebody answers the ping of %s", to)
					}
				}
			})
		}
	}
}
