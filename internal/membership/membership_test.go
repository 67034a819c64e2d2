package membership_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/membership"
)

// TestMembers runs three members at addresses of this machine's loopback device. One of them ends as by a power cut.
func TestMembers(t *testing.T) {
	key := bytes.Repeat([]byte{7}, membership.KeySize)
	members := map[string]*membership.Member{}
	var addrs []netip.Addr
	for i := range 3 {
		addr := netip.MustParseAddr(fmt.Sprintf("127.0.84.%d", i+1))
		name := fmt.Sprint("n", i+1)
		m, err := membership.Start(membership.Options{Name: name, Addr: addr, Port: 20472, Key: key, Log: slog.New(slog.DiscardHandler), Changed: func() {}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.Stop)
		m.Join(t.Context(), addrs)
		members[name], addrs = m, append(addrs, addr)
	}
	for _, m := range members {
		for name := range members {
			await(t, m, name, membership.Alive)
		}
	}
	if s := members["n1"].State("n9"); s != membership.Unknown {
		t.Errorf("a node that nobody has heard of is %v", s)
	}
	members["n3"].Stop()
	began := time.Now()
	await(t, members["n1"], "n3", membership.Dead)
	await(t, members["n2"], "n3", membership.Dead)
	t.Logf("known to be gone after %v", time.Since(began).Round(time.Millisecond))
	members["n2"].Leave()
	began = time.Now()
	await(t, members["n1"], "n2", membership.Dead)
	t.Logf("has said goodbye %v ago", time.Since(began).Round(time.Millisecond))
	if s := members["n1"].State("n1"); s != membership.Alive {
		t.Errorf("a member is %v to itself", s)
	}
}

// TestKeys: who has another key is nobody.
func TestKeys(t *testing.T) {
	start := func(n byte) *membership.Member {
		addr := netip.AddrFrom4([4]byte{127, 0, 85, n})
		m, err := membership.Start(membership.Options{Name: fmt.Sprint("n", n), Addr: addr, Port: 20472, Key: bytes.Repeat([]byte{n}, membership.KeySize),
			Log: slog.New(slog.DiscardHandler), Changed: func() {}})
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
	if _, err := membership.Start(membership.Options{Name: "n", Key: []byte("short")}); err == nil {
		t.Error("a short key is taken")
	}
}

func await(t *testing.T, m *membership.Member, node string, want membership.State) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); m.State(node) != want; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s is %v, want %v", node, m.State(node), want)
		}
	}
}
