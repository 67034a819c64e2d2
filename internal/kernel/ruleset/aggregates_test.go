package ruleset_test

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

func TestSetAggregates(t *testing.T) {
	n, path := linktest.NamespaceAt(t)
	r, err := ruleset.Open(path)
	testenv.Must(t, err)
	defer r.Close()
	anew, err := ruleset.Open(path) // that has set nothing itself
	testenv.Must(t, err)
	defer anew.Close()
	if held, found, err := anew.Aggregates(); found || err != nil {
		t.Errorf("before there is a table: %v, %v", held, err)
	}
	all := prefixes("198.51.100.0/24", "fd00:99::/64", "198.51.100.0/25")
	set := func(what string, want diff.Count) {
		t.Helper()
		for _, want := range []diff.Count{want, {}} {
			if got, err := r.SetAggregates(all); err != nil || got != want {
				t.Errorf("%s: changed %+v, %v, want %+v", what, got, err, want)
			}
			if held, found, err := anew.Aggregates(); err != nil || !found || !reflect.DeepEqual(held, inet.Disjoint(all)) {
				t.Errorf("%s: held is %v, %t, %v", what, held, found, err)
			}
		}
	}
	set("at first", diff.Count{Added: 1})
	isGolden(t, n, service.AggregatesTable, "testdata/aggregates.nft")
	nft(t, n, "flush", "chain", "inet", service.AggregatesTable, "prerouting")
	if _, found, err := anew.Aggregates(); found || err != nil {
		t.Errorf("a table that does nothing is found, %v", err)
	}
	set("after its chain was emptied", diff.Count{Added: 1})
	all = prefixes("198.51.100.0/24")
	set("one less", diff.Count{Removed: 1})
}

// TestAggregatesWithPackets sends for addresses of an aggregate, of which a Service has one. The router outside sends all of it to
// the node, and the node's default route leads to the router.
func TestAggregatesWithPackets(t *testing.T) {
	l := newLab(t)
	const web, nobody, elsewhere = 1, 9, 200
	var all []service.Frontend
	for _, f := range families {
		for _, protocol := range []string{"/TCP", "/UDP"} {
			all = append(all, frontend("web", host(fmt.Sprintf(f.lb, web), 80)+protocol, service.LoadBalancer, to(host(f.a, 8080))))
		}
		at := netip.MustParseAddr(fmt.Sprintf(f.lb, elsewhere)) // the router's own
		ip(t, l.out, fmt.Sprintf("addr add %s/%d dev lo nodad", at, at.BitLen()))
		serve(t, l.out, netip.AddrPortFrom(at, 80))
	}
	for name, value := range map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1", "ipv4/conf/all/send_redirects": "0", "ipv4/conf/eth0/send_redirects": "0",
		"ipv4/conf/eth0/accept_local": "1"} { // it routes what it sent itself as it would what others did
		testenv.Must(t, l.out.Sysctl(name, value))
	}
	ip(t, l.node, fmt.Sprintf("link set dev a group %d", ruleset.PodGroup), fmt.Sprintf("link set dev b group %d", ruleset.PodGroup))
	set(t, l.rules, plan(all...))
	forwarded := func(f addresses) (n int) {
		counter := map[string]string{"4": "IpForwDatagrams", "6": "Ip6OutForwDatagrams"}[f.network]
		for line := range strings.Lines(linktest.Run(t, l.node, "nstat", "-asz", counter)) {
			if w := strings.Fields(line); len(w) > 1 && w[0] == counter {
				_, _ = fmt.Sscan(w[1], &n)
			}
		}
		return n
	}
	for _, f := range families {
		before := forwarded(f)
		_, _, _ = ask(l.out, "udp"+f.network, "", host(fmt.Sprintf(f.lb, nobody), 80), silence)
		if n := forwarded(f) - before; n < 20 {
			t.Errorf("IPv%s: before they are refused the node sends a packet on %d times: the test does not test", f.network, n)
		}
	}
	_, err := l.rules.SetAggregates(prefixes("198.51.100.0/24", "2001:db8:1::/64"))
	testenv.Must(t, err)
	for _, f := range families {
		for name, from := range map[string]*link.Namespace{"outside": l.out, "a pod": l.b} {
			t.Run(name+" "+f.network, func(t *testing.T) {
				for _, network := range []string{"tcp" + f.network, "udp" + f.network} {
					for _, n := range []int{web, elsewhere} {
						if server, _, err := ask(from, network, "", host(fmt.Sprintf(f.lb, n), 80), patience); err != nil {
							t.Errorf("%s to %d: %s, %v", network, n, server, err)
						}
					}
					before := forwarded(f)
					isRefused(t, from, network, host(fmt.Sprintf(f.lb, nobody), 80))
					isRefused(t, from, network, host(fmt.Sprintf(f.lb, web), 81))
					if n := forwarded(f) - before; n > 8 {
						t.Errorf("%s: two packets that are refused were sent on %d times", network, n)
					}
				}
			})
		}
	}
}
