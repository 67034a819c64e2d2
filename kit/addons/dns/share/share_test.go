package share

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
)

func client(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

// fill has each of the clients take what it can, in turn, until none gets anything more.
func fill(t *testing.T, p *Places, clients int) map[int]int {
	t.Helper()
	has := map[int]int{}
	for more := true; more; {
		more = false
		for n := range clients {
			switch err := p.Take(client(n)); {
			case err == nil:
				has[n]++
				more = true
			case !errors.Is(err, ErrClient) && !errors.Is(err, ErrAll):
				t.Fatal(err)
			}
		}
	}
	return has
}

func TestGreedy(t *testing.T) {
	for _, test := range []struct{ clients, least, most, free int }{
		{1, 256, 256, 256},
		{2, 170, 171, 170},
		{3, 128, 128, 128},
		{100, 5, 6, 5}, // more than a node's pods, all of them greedy
		{510, 1, 2, 1},
		{5000, 0, 1, 0}, // addresses that nobody has
	} {
		p := New(512)
		has := fill(t, p, test.clients)
		for n := range test.clients {
			if has[n] < test.least || has[n] > test.most {
				t.Errorf("%d clients: one has %d places, want %d to %d", test.clients, has[n], test.least, test.most)
				break
			}
		}
		if free := 512 - p.Taken(); free < test.free {
			t.Errorf("%d clients: %d places are left, want %d at least", test.clients, free, test.free)
		}
		if p.Clients() > 512 {
			t.Errorf("%d clients: %d are remembered", test.clients, p.Clients())
		}
		err := p.Take(client(1 << 20))
		if want := test.free > 0; (err == nil) != want {
			t.Errorf("%d clients: one more gets a place: %v, want %t", test.clients, err, want)
		}
	}
}

// TestRandom takes and leaves at random, and in the end nothing is left of it.
func TestRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	p := New(64)
	has, all := map[netip.Addr]int{}, 0
	for range 100000 {
		c := client(random.IntN(40))
		if random.IntN(2) == 0 {
			err := p.Take(c)
			want := error(nil)
			if free := 64 - all; free == 0 {
				want = ErrAll
			} else if has[c] >= free {
				want = ErrClient
			}
			if !errors.Is(err, want) {
				t.Fatalf("a client with %d places, %d taken in all: got %v, want %v", has[c], all, err, want)
			}
			if err == nil {
				has[c]++
				all++
			}
		} else if has[c] > 0 {
			p.Leave(c)
			has[c]--
			all--
		}
		if p.Taken() != all {
			t.Fatalf("%d places are taken, want %d", p.Taken(), all)
		}
	}
	for c, n := range has {
		for range n {
			p.Leave(c)
		}
	}
	if p.Taken() != 0 || p.Clients() != 0 {
		t.Errorf("all have left, and %d places of %d clients are taken", p.Taken(), p.Clients())
	}
}

func TestClient(t *testing.T) {
	for _, test := range []struct {
		addr net.Addr
		want netip.Addr
	}{
		{&net.UDPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 5}, netip.MustParseAddr("10.0.0.1")},
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 6}, netip.MustParseAddr("10.0.0.1")},
		{&net.UDPAddr{IP: net.ParseIP("fd00::1"), Port: 5}, netip.MustParseAddr("fd00::1")},
		{&net.UnixAddr{Name: "x"}, netip.Addr{}},
		{nil, netip.Addr{}},
	} {
		if got := Client(test.addr); got != test.want {
			t.Errorf("%v: %v, want %v", test.addr, got, test.want)
		}
	}
}
