package proxy

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

const vip, at = "172.16.0.1", "172.16.0.1:80"

var modes = []netconf.ServiceProxy{netconf.ProxyAuto, netconf.ProxyNFTables}

// TestFollow: Services and slices are added, changed and deleted.
func TestFollow(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1", "10.0.0.2")
	for _, mode := range modes {
		n := newNode(t, paths, mode)
		n.follows(t)
		if !refused(t, "10.0.0.9:80") {
			t.Fatal("what has no server is answered")
		}
		n.set(endpoints("web", "10.0.0.1")) // before its Service
		n.follows(t)
		n.set(web("web", vip), web("empty", "172.16.0.2"))
		n.follows(t)
		if who := ask(t, dial(t, "tcp", at)); who != "10.0.0.1" {
			t.Errorf("%s: %s answers", mode, who)
		}
		if !refused(t, "172.16.0.2:80") {
			t.Errorf("%s: a Service without endpoints does not refuse", mode)
		}
		n.set(endpoints("web", "10.0.0.2"))
		n.follows(t)
		if who := ask(t, dial(t, "tcp", at)); who != "10.0.0.2" {
			t.Errorf("%s: %s answers, the new endpoint is 10.0.0.2", mode, who)
		}
		n.set(web("web", "172.16.0.3")) // deleted and created again between two events
		n.follows(t)
		if who := ask(t, dial(t, "udp", "172.16.0.3:80")); who != "10.0.0.2" {
			t.Errorf("%s: %s answers at the new address", mode, who)
		}
		n.delete(n.services[nameOf(web("web", vip))])
		n.follows(t)
		n.delete(endpoints("web"), web("empty", ""))
		if s := n.follows(t); len(s.NFTables.Frontends)+len(s.Connect) > 0 {
			t.Errorf("%s: of no Services there are %+v", mode, s)
		}
		if changes := n.counted(t, "fathom_service_changes_total"); mode == netconf.ProxyAuto && changes["whole"] == 0 || changes["change"] < 5 {
			t.Errorf("%s: %v: not by changes", mode, changes)
		}
	}
}

// TestRandom adds, changes and deletes many Services, a few at a time.
func TestRandom(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	n := newNode(t, paths, netconf.ProxyAuto)
	for range 100 {
		for range 1 + r.IntN(5) {
			i := r.IntN(8)
			name := fmt.Sprintf("web-%d", i)
			switch r.IntN(5) {
			case 0:
				n.delete(web(name, ""))
			case 1:
				n.delete(endpoints(name))
			case 2:
				n.set(web(name, fmt.Sprintf("172.16.1.%d", r.IntN(10)))) // another Service may have it
			default:
				var list []string
				for range r.IntN(40) {
					list = append(list, fmt.Sprintf("%s10.0.0.%d", []string{"", "-"}[r.IntN(2)], r.IntN(50)))
				}
				n.set(endpoints(name, list...))
			}
		}
		n.follows(t)
	}
	if changes := n.counted(t, "fathom_service_errors_total"); len(changes) > 0 {
		t.Errorf("the kernel refused changes: %v", changes)
	}
}

// TestRestart: a second proxy finds what the first one left. It changes nothing, and ends no connection.
func TestRestart(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1", "10.0.0.2")
	for _, mode := range modes {
		n := newNode(t, paths, mode)
		n.set(web("web", vip), endpoints("web", "10.0.0.1", "10.0.0.2"), web("other", "172.16.0.2", localOnly(32000)), endpoints("other", "10.0.0.1"))
		n.follows(t)
		tcp, udp := dial(t, "tcp", at), dial(t, "udp", at)
		byTCP, byUDP := ask(t, tcp), ask(t, udp)
		rules := nft(t, "list", "ruleset")
		n.start(t, paths, mode)
		n.follows(t)
		n.sweep(t)
		if changed := n.counted(t, "fathom_service_changes_total"); changed["whole"]+changed["change"] > 0 {
			t.Errorf("%s: the second proxy changed %v", mode, changed)
		}
		if ended := n.counted(t, "fathom_service_flows_ended_total"); ended["entry"]+ended["socket"] > 0 {
			t.Errorf("%s: the second proxy ended %v", mode, ended)
		}
		if now := nft(t, "list", "ruleset"); now != rules {
			t.Errorf("%s: the rules were\n%s\nand are\n%s", mode, rules, now)
		}
		if now := ask(t, tcp); now != byTCP {
			t.Errorf("%s: the connection is answered by %s, and was by %s", mode, now, byTCP)
		}
		if now := ask(t, udp); now != byUDP {
			t.Errorf("%s: the flow is answered by %s, and was by %s", mode, now, byUDP)
		}
		// The proxy catches up with what changed while it was away.
		n.set(endpoints("web", "10.0.0.2"))
		n.delete(web("other", ""))
		n.start(t, paths, mode)
		n.follows(t)
		n.delete(web("web", ""), endpoints("web"), endpoints("other"))
		n.follows(t)
	}
}

// TestModes switches from each mode to the other, and to none. After that the kernel is as before.
func TestModes(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1")
	before := nft(t, "list", "ruleset")
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("web", vip, localOnly(32000)), endpoints("web", "10.0.0.1"))
	for range 2 {
		s := n.follows(t)
		if s.ConnectMissing != "" {
			t.Skip(s.ConnectMissing)
		}
		kept := dial(t, "tcp", at)
		if _, err := os.Stat(paths.BPF); err != nil || len(s.Connect) == 0 {
			t.Errorf("auto: %v, %+v", err, s.Connect)
		}
		n.mode(netconf.ProxyNFTables)
		if s := n.follows(t); len(s.Connect) > 0 || len(s.NFTables.Frontends) == 0 {
			t.Errorf("nftables: %+v", s)
		}
		n.untouched(t, "")
		if !n.loopback.on {
			t.Error("127.0.0.1:nodePort has no way back")
		}
		n.loopback.on = false // an administrator may do this
		if n.compare(t.Context()); n.comparing == nil {
			t.Fatal("nothing is compared")
		}
		n.conclude(<-n.results())
		if n.follows(t); !n.loopback.on {
			t.Error("127.0.0.1:nodePort has no way back any more")
		}
		ask(t, kept) // connections live on
		ask(t, dial(t, "tcp", at))
		n.mode(netconf.ProxyOff)
		n.step(t.Context(), false)
		n.untouched(t, before)
		ask(t, kept)
		if s := n.Status(); s != (answer.ProxyStatus{Ready: true}) {
			t.Errorf("off: %+v", s)
		}
		if n.loopback.on || n.loopback.open {
			t.Errorf("of the way to 127.0.0.1 stays, or was open: %+v", n.loopback)
		}
		n.follow()
		n.mode(netconf.ProxyAuto)
	}
	n.follows(t)
	n.mode(netconf.ProxyNFTables)
	n.follows(t)
	n.stop()
	for range 2 {
		testenv.Must(t, Remove(paths, &n.loopback))
	}
	n.mode(netconf.ProxyOff) // after this, untouched is the only check
	n.untouched(t, before)
	if n.loopback.on || n.loopback.open {
		t.Errorf("of the way to 127.0.0.1 stays, or was open: %+v", n.loopback)
	}
}

// untouched checks that nothing is balanced at connect(), and that the rules are the given ones.
func (n *node) untouched(t *testing.T, rules string) {
	t.Helper()
	if _, err := os.Stat(n.Paths.BPF); !errors.Is(err, os.ErrNotExist) {
		left, _ := filepath.Glob(n.Paths.BPF + "/*")
		t.Errorf("pins are left: %v %v", err, left)
	}
	if now := nft(t, "list", "ruleset"); n.config.Mode == netconf.ProxyOff && now != rules {
		t.Errorf("rules are left:\n%s", now)
	}
}

// TestDamage: another process removes what the proxy made.
func TestDamage(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	serve(t, "10.0.0.1")
	n := newNode(t, paths, netconf.ProxyAuto)
	n.set(web("web", vip), endpoints("web", "10.0.0.1"))
	n.follows(t)
	destroy := func() {
		nft(t, "delete", "table", "inet", ruleset.ServicesTable)
		if n.kernel.connect != nil {
			testenv.Must(t, os.Remove(filepath.Join(paths.BPF, "fathom_connect4")))
		}
	}
	destroy()
	n.step(t.Context(), true) // the proxy has heard of no change
	if _, differences := n.differs(t); len(differences) == 0 {
		t.Error("what was destroyed is there")
	}
	n.compared(t)
	if !n.whole {
		t.Error("a comparison does not find what was destroyed")
	}
	n.follows(t)
	if n.compared(t); n.whole {
		t.Error("a comparison finds something after that")
	}
	ask(t, dial(t, "tcp", at))
	destroy()
	n.set(web("other", "172.16.0.2")) // a change finds unexpected contents
	n.follows(t)
	if errs := n.counted(t, "fathom_service_errors_total"); errs["change"] != 1 || errs["whole"] != 0 {
		t.Errorf("%v", errs)
	}
}

// run runs the loop until stop is called.
func run(t *testing.T, p *Proxy) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		p.Run(ctx)
		close(ended)
	}()
	return func() {
		cancel()
		<-ended
	}
}

// TestMends runs the loop while another process removes what the proxy made, and Services change all the time.
func TestMends(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	n := newNode(t, paths, netconf.ProxyAuto)
	n.Resync = 20 * time.Millisecond
	for i := range 50 {
		n.set(web(fmt.Sprintf("web-%d", i), fmt.Sprintf("172.16.1.%d", i)), endpoints(fmt.Sprintf("web-%d", i), "10.0.0.1", "10.0.0.2"))
	}
	stop := run(t, n.Proxy)
	wholes := func() uint64 { return n.observed(t, "whole") }
	changing := 0
	until := func(what string, so func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !so(); changing++ {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not so after a minute", what)
			}
			n.set(endpoints(fmt.Sprintf("web-%d", changing%50), "10.0.0.1", fmt.Sprintf("10.0.1.%d", changing%200)))
			time.Sleep(time.Millisecond)
		}
	}
	until("the first", func() bool { return wholes() > 0 })
	compared := n.observed(t, "compare")
	until("comparisons", func() bool { return n.observed(t, "compare") >= compared+2 })
	if got := wholes(); got != 1 {
		t.Errorf("all was set %d times, though nothing was wrong", got)
	}
	for i := range 2 {
		nft(t, "flush", "map", "inet", ruleset.ServicesTable, "endpoints4")
		until("mended", func() bool { return wholes() >= uint64(i)+2 })
	}
	stop()
	n.whole = true
	n.follows(t)
	if errs := n.counted(t, "fathom_service_errors_total"); errs["whole"] > 0 {
		t.Errorf("%v", errs)
	}
}

// TestRenew: the proxy sets everything from time to time, even if comparisons find no difference. That changes nothing.
func TestRenew(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	n := newNode(t, paths, netconf.ProxyAuto)
	n.Resync, n.Renew = 10*time.Millisecond, 30*time.Millisecond
	n.set(web("web", "172.16.1.1"), endpoints("web", "10.0.0.1", "10.0.0.2"))
	stop := run(t, n.Proxy)
	for deadline := time.Now().Add(time.Minute); n.observed(t, "whole") < 3 || n.observed(t, "compare") < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("set %d times and compared %d times in a minute", n.observed(t, "whole"), n.observed(t, "compare"))
		}
	}
	stop()
	n.whole = true
	n.follows(t)
}

// TestStatus: the kernel rejects changes, first from the beginning and then later.
func TestStatus(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	bad := paths
	bad.BPF = "/proc/nothing"
	n := newNode(t, bad, netconf.ProxyAuto)
	n.set(web("web", vip))
	if s := n.Status(); s.Ready || s.Problem == "" {
		t.Errorf("before it has begun: %+v", s)
	}
	n.inbox.synced = func() bool { return false }
	n.step(t.Context(), false)
	if s := n.Status(); s.Ready || !strings.Contains(s.Problem, "API server") {
		t.Errorf("before it has heard of all Services: %+v", s)
	}
	n.inbox.synced = func() bool { return true }
	n.step(t.Context(), false)
	if s := n.Status(); s.Ready || !strings.Contains(s.Problem, bad.BPF) {
		t.Errorf("the kernel refuses: %+v", s)
	}
	for range 10 {
		n.set(web("web", vip))
		n.step(t.Context(), false)
	}
	if errs := n.counted(t, "fathom_service_errors_total"); errs["whole"] != 1 {
		t.Errorf("it was tried again at events: %v", errs)
	}
	n.step(t.Context(), true)
	if errs := n.counted(t, "fathom_service_errors_total"); errs["whole"] != 2 {
		t.Errorf("it is not tried again with time: %v", errs)
	}
	n.kernel.paths.BPF = paths.BPF
	n.step(t.Context(), true)
	n.follows(t)
	n.kernel.connect.Close()
	n.kernel.connect, n.kernel.paths.BPF = nil, bad.BPF
	n.whole = true
	n.step(t.Context(), false)
	if s := n.Status(); !s.Ready || s.Problem == "" {
		t.Errorf("the kernel refuses after it has held all: %+v", s)
	}
	n.kernel.paths.BPF = paths.BPF
	n.step(t.Context(), true)
	n.mode(netconf.ProxyOff)
	n.step(t.Context(), false)
	n.mode(netconf.ProxyAuto)
	n.follow()
	n.inbox.synced = func() bool { return false }
	n.step(t.Context(), false)
	if s := n.Status(); !s.Ready || s.Problem == "" {
		t.Errorf("it has not heard of all Services, another time: %+v", s)
	}
}

// TestExternalIPs: a Service's external IP is served as long as the policy allows it. A change of the policy causes no full pass.
// Otherwise all nodes would set all Services whenever a Node is added.
func TestExternalIPs(t *testing.T) {
	paths, ok := inside(t)
	if !ok {
		return
	}
	n := newNode(t, paths, netconf.ProxyAuto)
	web := web("a", vip)
	web.Spec.ExternalIPs = []string{"203.0.113.5"}
	n.set(web)
	key := service.Key{Addr: netip.MustParseAddr("203.0.113.5"), Protocol: service.TCP, Port: 80}
	served := func() (nftables, connect bool) {
		t.Helper()
		n.step(t.Context(), false)
		s, err := n.State(t.Context())
		testenv.Must(t, err)
		connect = slices.ContainsFunc(s.Connect, func(b service.Balanced) bool { return b.Key == key }) || s.ConnectMissing != ""
		return slices.ContainsFunc(s.NFTables.Frontends, func(f service.Frontend) bool { return f.Key == key }), connect
	}
	if nftables, connect := served(); nftables || connect {
		t.Errorf("served before it is known what is allowed: by nftables %t, at connect() %t", nftables, connect)
	}
	at := n.wholeAt
	for _, tc := range []struct {
		x    service.ExternalIPs
		want bool
	}{
		{service.ExternalIPs{Mode: netconf.ExternalIPsAny}, true},
		{service.ExternalIPs{Mode: netconf.ExternalIPsAny, PodsOnly: true}, true},
		{service.ExternalIPs{Mode: netconf.ExternalIPsAny, Reserved: []service.Reserved{{Prefix: netip.MustParsePrefix("203.0.113.5/32"), Owner: service.ReservedNode, Name: "b"}}}, false},
		{service.ExternalIPs{Mode: netconf.ExternalIPsAny}, true},
		{service.ExternalIPs{Mode: netconf.ExternalIPsOff}, false},
	} {
		n.SetExternalIPs(tc.x)
		if nftables, connect := served(); nftables != tc.want || connect != tc.want {
			t.Errorf("%+v: served by nftables %t, at connect() %t, want %t", tc.x, nftables, connect, tc.want)
		}
	}
	if n.wholeAt != at {
		t.Error("all Services were set anew for what concerns one")
	}
}

// TestCompareInterval bounds the processor time of full comparisons.
func TestCompareInterval(t *testing.T) {
	for took, want := range map[time.Duration]time.Duration{0: 30 * time.Second, 100 * time.Millisecond: 30 * time.Second, 3 * time.Second: 5 * time.Minute} {
		if got := untilCompared(30*time.Second, took); got != want {
			t.Errorf("after one of %v the next comes in %v, want %v", took, got, want)
		}
	}
}
