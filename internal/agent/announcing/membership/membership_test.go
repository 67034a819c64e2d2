package membership_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/agent/announcing/membership"
	"github.com/fathom-network/fathom/internal/facts/keyset"
)

// port is where members listen: several runs of these tests may be on one machine.
var port = uint16(20000 + os.Getpid()%12000)

// TestMembers runs three members at addresses of this machine's loopback device. One of them ends as by a power cut.
func TestMembers(t *testing.T) {
	key := bytes.Repeat([]byte{7}, keyset.Size)
	members := map[string]*membership.Member{}
	var addrs []netip.Addr
	var power sync.Map // addresses of nodes that have none
	lives := func(_ context.Context, at netip.AddrPort) bool {
		_, off := power.Load(at)
		return !off
	}
	start := func(name string, addr netip.Addr) *membership.Member {
		m, err := membership.Start(membership.Options{Name: name, Addr: addr, Port: port, Keys: [][]byte{key}, Nodes: nodesAt("127.0.84.", 3), Log: slog.New(slog.DiscardHandler), Changed: func() {}, Lives: lives})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Stop)
		m.Join(t.Context(), addrs)
		return m
	}
	for i := range 3 {
		addr := netip.MustParseAddr(fmt.Sprintf("127.0.84.%d", i+1))
		name := fmt.Sprint("n", i+1)
		members[name], addrs = start(name, addr), append(addrs, addr)
	}
	for _, m := range members {
		for name := range members {
			await(t, m, name, membership.Alive)
		}
	}
	if s := members["n1"].State("n9"); s != membership.Unknown {
		t.Errorf("a node that nobody has heard of is %v", s)
	}
	// An agent that ends, whether it says so or not, leaves its node behind, and comes back.
	for _, end := range []func(*membership.Member){(*membership.Member).Stop, (*membership.Member).Leave} {
		end(members["n3"])
		await(t, members["n1"], "n3", membership.Away)
		await(t, members["n2"], "n3", membership.Away)
		members["n3"] = start("n3", addrs[2])
		await(t, members["n1"], "n3", membership.Alive)
		await(t, members["n2"], "n3", membership.Alive)
	}
	power.Store(netip.AddrPortFrom(addrs[2], port), true)
	members["n3"].Stop()
	began := time.Now()
	await(t, members["n1"], "n3", membership.Dead)
	await(t, members["n2"], "n3", membership.Dead)
	t.Logf("known to be gone after %v", time.Since(began).Round(time.Millisecond))
	// A node that is switched off first ends its agent.
	members["n2"].Leave()
	await(t, members["n1"], "n2", membership.Away)
	power.Store(netip.AddrPortFrom(addrs[1], port), true)
	await(t, members["n1"], "n2", membership.Dead)
	if s := members["n1"].State("n1"); s != membership.Alive {
		t.Errorf("a member is %v to itself", s)
	}
}

// TestPort: a kernel refuses a connection to the port of an agent that has ended. That there is none takes a machine that
// says nothing, and the scenario balancer has one.
func TestPort(t *testing.T) {
	key := bytes.Repeat([]byte{7}, keyset.Size)
	var members []*membership.Member
	for i := range 2 {
		addr := netip.AddrFrom4([4]byte{127, 0, 86, byte(i + 1)})
		m, err := membership.Start(membership.Options{Name: fmt.Sprint("n", i+1), Addr: addr, Port: port, Keys: [][]byte{key}, Nodes: nodesAt("127.0.86.", 2), Log: slog.New(slog.DiscardHandler), Changed: func() {}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Stop)
		members = append(members, m)
	}
	members[1].Join(t.Context(), []netip.Addr{netip.MustParseAddr("127.0.86.1")})
	await(t, members[0], "n2", membership.Alive)
	members[1].Stop()
	await(t, members[0], "n2", membership.Away)
}

// TestKeys: who has another key is nobody.
func TestKeys(t *testing.T) {
	start := func(n byte) *membership.Member {
		addr := netip.AddrFrom4([4]byte{127, 0, 85, n})
		m, err := membership.Start(membership.Options{Name: fmt.Sprint("n", n), Addr: addr, Port: port, Keys: [][]byte{bytes.Repeat([]byte{n}, keyset.Size)},
			Nodes: nodesAt("127.0.85.", 2), Log: slog.New(slog.DiscardHandler), Changed: func() {}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Stop)
		return m
	}
	a, b := start(1), start(2)
	b.Join(t.Context(), []netip.Addr{netip.MustParseAddr("127.0.85.1")})
	if a.State("n2") != membership.Unknown || b.State("n1") != membership.Unknown {
		t.Error("they know each other")
	}
	if _, err := membership.Start(membership.Options{Name: "n", Keys: [][]byte{[]byte("short")}}); err == nil {
		t.Error("a short key is taken")
	}
	if _, err := membership.Start(membership.Options{Name: "n"}); err == nil {
		t.Error("a member has no key")
	}
}

// nodesAt are nodes n1, n2 and so on, at addresses that begin with a prefix.
func nodesAt(prefix string, count int) map[string][]netip.Addr {
	nodes := map[string][]netip.Addr{}
	for i := range count {
		nodes[fmt.Sprint("n", i+1)] = []netip.Addr{netip.MustParseAddr(fmt.Sprint(prefix, i+1))}
	}
	return nodes
}

func await(t *testing.T, m *membership.Member, node string, want membership.State) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); m.State(node) != want; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s is %v, want %v", node, m.State(node), want)
		}
	}
}
