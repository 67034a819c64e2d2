package ruleset_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestServicesAffinityAtOneAddress: if a Service has two endpoints at one address, new clients reach both, and each client keeps its
// endpoint when the other one goes and comes back.
func TestServicesAffinityAtOneAddress(t *testing.T) {
	l := newLab(t)
	f := families[0]
	serveAs(t, l.a, netip.AddrPortFrom(netip.MustParseAddr(f.a), 8081), "second")
	first, second := host(f.a, 8080), host(f.a, 8081)
	front := func(ends ...string) service.Frontend {
		return with(frontend("web", host(fmt.Sprintf(f.vip, 1), 80)+"/TCP", service.ClusterIP, to(ends...)), func(x *service.Frontend) { x.Affinity = time.Hour })
	}
	whole := front(first, second, host(f.b, 8080))
	set(t, l.rules, plan(whole))
	met := func() string {
		t.Helper()
		server, _, err := ask(l.out, "tcp4", f.out, host(fmt.Sprintf(f.vip, 1), 80), patience)
		testenv.Must(t, err)
		return server
	}
	stays := func(server, when string) {
		t.Helper()
		for range 4 {
			if got := met(); got != server {
				t.Fatalf("%s, a client of %s is sent to %s", when, server, got)
			}
		}
	}
	all := map[string]bool{}
	for range 60 { // new clients
		linktest.Run(t, l.node, "nft", "flush", "map", "inet", ruleset.ServicesTable, "affinity4")
		server := met()
		stays(server, "with all")
		if server == "second" && !all[server] {
			less := front(second, host(f.b, 8080))
			testenv.Must(t, l.rules.ChangeServices([]service.Change{{Service: whole.Service, Old: []service.Frontend{whole}, New: []service.Frontend{less}}}))
			stays(server, "without the first")
			testenv.Must(t, l.rules.ChangeServices([]service.Change{{Service: whole.Service, Old: []service.Frontend{less}, New: []service.Frontend{whole}}}))
			stays(server, "when the first is back")
		}
		all[server] = true
	}
	if len(all) != 3 {
		t.Errorf("60 clients met only %v", all)
	}
}

// TestServicesAffinityFull: without room for another client, that client is served anyway, stored clients keep their endpoints, and
// the Service is reported.
func TestServicesAffinityFull(t *testing.T) {
	const room = ruleset.ClientsRemembered
	l := newLab(t)
	f := families[0]
	vip := host(fmt.Sprintf(f.vip, 1), 80)
	front := with(frontend("web", vip+"/TCP", service.ClusterIP, to(host(f.a, 8080), host(f.b, 8080), host(f.far, 8080))), func(x *service.Frontend) { x.Affinity = time.Hour })
	other := with(frontend("other", host(fmt.Sprintf(f.vip, 2), 80)+"/TCP", service.ClusterIP, front.Inside), func(x *service.Frontend) { x.Affinity = time.Hour })
	set(t, l.rules, plan(front, other))
	met := func(from, at string) string {
		t.Helper()
		server, _, err := ask(l.out, "tcp4", from, at, patience)
		testenv.Must(t, err)
		return server
	}
	full := func(want ...uint32) {
		t.Helper()
		if got, err := l.rules.AffinityFull(); err != nil || !slices.Equal(got, want) {
			t.Errorf("there is no room for clients of %x, want %x; %v", got, want, err)
		}
	}
	mine := met(f.out, vip)
	full()
	file := filepath.Join(t.TempDir(), "elements")
	element := func(i int) string { return fmt.Sprintf("172.%d.%d.%d . 7", 16+i>>16, i>>8&255, i&255) }
	const portion = 1 << 15
	for i := 0; i < room-1; i += portion {
		var b strings.Builder
		fmt.Fprintf(&b, "add element inet %s affinity4 {", ruleset.ServicesTable)
		for j := i; j < min(i+portion, room-1); j++ {
			fmt.Fprintf(&b, "%s : 9,\n", element(j))
		}
		b.WriteString("}\n")
		testenv.Must(t, os.WriteFile(file, []byte(b.String()), 0o600))
		linktest.Run(t, l.node, "nft", "-f", file)
	}
	servers := map[string]bool{}
	for range 40 {
		servers[met(f.out2, vip)] = true
		if got := met(f.out, vip); got != mine {
			t.Fatalf("a client of %s is sent to %s", mine, got)
		}
	}
	if len(servers) < 2 {
		t.Errorf("a client that there is no room for meets only %v", servers)
	}
	full(service.ID(front.Service))
	holds(t, l.rules, plan(front, other))

	linktest.Run(t, l.node, "nft", "delete", "element", "inet", ruleset.ServicesTable, "affinity4", "{ "+element(0)+" }")
	theirs := met(f.out2, vip)
	for range 10 {
		if got := met(f.out2, vip); got != theirs {
			t.Fatalf("when there is room, a client of %s is sent to %s", theirs, got)
		}
	}
}
