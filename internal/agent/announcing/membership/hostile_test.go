package membership_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/fathom-network/fathom/internal/agent/announcing/membership"
	"github.com/fathom-network/fathom/internal/facts/keyset"
)

// group is members on loopback, n1 and so on.
type group struct {
	*testing.T
	prefix string
	key    []byte

	mu    sync.Mutex
	asked map[netip.Addr]int  // how often a kernel was asked whether it is there
	off   map[netip.Addr]bool // those that have no power
	log   bytes.Buffer
}

func newGroup(t *testing.T, prefix string) *group {
	return &group{T: t, prefix: prefix, key: bytes.Repeat([]byte{7}, keyset.Size), asked: map[netip.Addr]int{}, off: map[netip.Addr]bool{}}
}

func (g *group) addr(n int) netip.Addr { return netip.MustParseAddr(fmt.Sprint(g.prefix, n)) }

// Write is of the members' log.
func (g *group) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.Write(p)
}

func (g *group) lives(_ context.Context, at netip.AddrPort) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked[at.Addr()]++
	return !g.off[at.Addr()]
}

func (g *group) asks(n int) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.asked[g.addr(n)]
}

func (g *group) until(what string, done func() bool) {
	g.Helper()
	for deadline := time.Now().Add(time.Minute); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			g.Fatalf("%s; log:\n%s", what, g.logged())
		}
	}
}

func (g *group) logged() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.log.String()
}

// start starts a member of the name and of the n-th address, and lets it join all that are there.
func (g *group) start(name string, n, nodes int, keys ...[]byte) *membership.Member {
	g.Helper()
	if keys == nil {
		keys = [][]byte{g.key}
	}
	m, err := membership.Start(membership.Options{Name: name, Addr: g.addr(n), Port: port, Keys: keys, Nodes: nodesAt(g.prefix, nodes),
		Log: slog.New(slog.NewTextHandler(g, nil)), Changed: func() {}, Lives: g.lives})
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(m.Stop)
	var addrs []netip.Addr
	for i := range nodes {
		addrs = append(addrs, g.addr(i+1))
	}
	m.Join(g.Context(), addrs)
	return m
}

// claimDead sends one a message that a node is dead, from an address, in memberlist's format: the type, a map by MessagePack,
// and all of it encrypted by AES-GCM.
func (g *group) claimDead(from, to int, node string, incarnation uint32) {
	g.Helper()
	text := func(s string) []byte { return append([]byte{0xa0 | byte(len(s))}, s...) }
	msg := []byte{5, 0x83}
	msg = append(append(msg, text("Incarnation")...), 0xce)
	msg = binary.BigEndian.AppendUint32(msg, incarnation)
	msg = append(append(msg, text("Node")...), text(node)...)
	msg = append(append(msg, text("From")...), text("n2")...)
	block, err := aes.NewCipher(g.key)
	if err != nil {
		g.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		g.Fatal(err)
	}
	nonce := make([]byte, gcm.NonceSize())
	_, _ = rand.Read(nonce)
	conn, err := net.DialUDP("udp", &net.UDPAddr{IP: g.addr(from).AsSlice()}, &net.UDPAddr{IP: g.addr(to).AsSlice(), Port: int(port)})
	if err != nil {
		g.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(gcm.Seal(append([]byte{1}, nonce...), nonce, msg, nil)); err != nil {
		g.Fatal(err)
	}
}

// TestFalseDeath: who has the key says of a node that it is dead, in a way that the node's agent cannot refute. Nobody takes
// its addresses, and when it dies everybody knows.
func TestFalseDeath(t *testing.T) {
	g := newGroup(t, "127.0.87.")
	members := map[string]*membership.Member{}
	for i := range 3 {
		members[fmt.Sprint("n", i+1)] = g.start(fmt.Sprint("n", i+1), i+1, 3)
	}
	for _, m := range members {
		for name := range members {
			await(t, m, name, membership.Alive)
		}
	}
	before := g.asks(3)
	g.claimDead(2, 1, "n3", math.MaxUint32)
	g.claimDead(1, 2, "n3", math.MaxUint32)
	// That it has been asked about many times is the proof that the claim was heard, and heeded. On a machine that is busy an
	// answer may be late, and its agent is taken to be away for a moment; no address moves for that.
	g.until("the claim was not heard", func() bool {
		for _, name := range []string{"n1", "n2"} {
			if members[name].State("n3") == membership.Dead {
				t.Fatalf("%s has believed it", name)
			}
		}
		return g.asks(3) >= before+20
	})
	await(t, members["n1"], "n3", membership.Alive)
	await(t, members["n2"], "n3", membership.Alive)
	g.until("nobody is told of it", func() bool {
		return strings.Contains(g.logged(), "other agents report that this agent has gone, but it answers")
	})
	g.mu.Lock()
	g.off[g.addr(3)] = true
	g.mu.Unlock()
	members["n3"].Stop()
	await(t, members["n1"], "n3", membership.Dead)
	await(t, members["n2"], "n3", membership.Dead)
}

// TestStranger: who has the key and is at no node's address cannot join, and what he says of others is not heard.
func TestStranger(t *testing.T) {
	g := newGroup(t, "127.0.88.")
	a, b := g.start("n1", 1, 2), g.start("n2", 2, 2)
	await(t, a, "n2", membership.Alive)
	await(t, b, "n1", membership.Alive)
	c := memberlist.DefaultLANConfig()
	c.Name, c.BindAddr, c.BindPort, c.AdvertisePort, c.SecretKey, c.LogOutput = "n3", g.addr(9).String(), int(port), int(port), g.key, g
	stranger, err := memberlist.Create(c)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stranger.Shutdown() }()
	for range 3 {
		if n, err := stranger.Join([]string{netip.AddrPortFrom(g.addr(1), port).String(), netip.AddrPortFrom(g.addr(2), port).String()}); n > 0 || err == nil {
			t.Errorf("a stranger has joined %d members", n)
		}
	}
	g.claimDead(9, 1, "n2", math.MaxUint32)
	g.until("nobody is told of the stranger", func() bool { return strings.Count(g.logged(), "rejected traffic to the membership port") >= 2 }) // by n1 and by n2
	if a.Join(t.Context(), []netip.Addr{g.addr(2)}) != 1 {
		t.Error("n1 and n2 do not hear each other")
	}
	if s := a.State("n2"); s != membership.Alive || g.asks(2) > 0 || a.State("n3") != membership.Unknown || stranger.NumMembers() != 1 {
		t.Errorf("n2 is %v and was asked about %d times, n3 is %v, and the stranger knows %d", s, g.asks(2), a.State("n3"), stranger.NumMembers())
	}
	// A node that comes may join, under its own name and address. The stranger's address is one of theirs then: it would be
	// let in, and tell others of what it has heard.
	if err := stranger.Shutdown(); err != nil {
		t.Fatal(err)
	}
	a.SetNodes(nodesAt("127.0.88.", 9))
	b.SetNodes(nodesAt("127.0.88.", 9))
	nine := g.start("n9", 8, 9) // another's name
	if nine.State("n1") != membership.Alive || a.State("n9") != membership.Unknown {
		t.Errorf("n9 at the address of n8 is %v", a.State("n9"))
	}
	eight := g.start("n8", 8+99, 9) // another's address
	if a.State("n8") != membership.Unknown || eight.State("n1") != membership.Unknown {
		t.Errorf("n8 at no node's address is %v", a.State("n8"))
	}
	seven := g.start("n7", 7, 9)
	await(t, a, "n7", membership.Alive)
	await(t, b, "n7", membership.Alive)
	_ = seven
}

// TestRotation changes the key of members that go on, one after the other: none is lost, and in the end the old key is of no
// use any more.
func TestRotation(t *testing.T) {
	g := newGroup(t, "127.0.89.")
	old, fresh := g.key, bytes.Repeat([]byte{8}, keyset.Size)
	var members []*membership.Member
	var addrs []netip.Addr
	for i := range 3 {
		members = append(members, g.start(fmt.Sprint("n", i+1), i+1, 4))
		addrs = append(addrs, g.addr(i+1))
	}
	hear := func(when string) {
		t.Helper()
		for i, m := range members {
			for j := range members {
				await(t, m, fmt.Sprint("n", j+1), membership.Alive)
				if i != j && m.Join(t.Context(), addrs[j:j+1]) != 1 {
					t.Errorf("%s: n%d does not reach n%d", when, i+1, j+1)
				}
			}
		}
	}
	hear("at first")
	for step, keys := range [][][]byte{{old, fresh}, {fresh, old}, {fresh}} {
		for i, m := range members {
			if err := m.SetKeys(keys); err != nil {
				t.Fatal(err)
			}
			hear(fmt.Sprintf("step %d at n%d", step, i+1))
		}
	}
	for n := range 3 {
		if g.asks(n+1) > 0 {
			t.Errorf("n%d was taken for gone meanwhile", n+1)
		}
	}
	if late := g.start("n4", 4, 4, old); late.State("n1") != membership.Unknown || members[0].State("n4") != membership.Unknown {
		t.Error("one with the old key has joined")
	} else {
		late.Stop()
	}
	g.start("n4", 4, 4, fresh)
	await(t, members[0], "n4", membership.Alive)
	if err := members[0].SetKeys(nil); err == nil {
		t.Error("a member has no key")
	}
}
