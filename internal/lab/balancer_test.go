package lab

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
)

// answering is a server that greets with its name and then echoes what it is sent.
func answering(t *testing.T, name string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.WriteString(c, name)
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l
}

func TestBalance(t *testing.T) {
	a, b := answering(t, "a"), answering(t, "b")
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := front.Addr().String()
	front.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Balance(ctx, address, []string{a.Addr().String(), b.Addr().String()}) }()

	// ask returns what a connection gets: a server's greeting and its echo, or nothing.
	ask := func() string {
		var c net.Conn
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if c, err = net.Dial("tcp", address); err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
		defer c.Close()
		_, _ = io.WriteString(c, "!")
		_ = c.(*net.TCPConn).CloseWrite()
		got, _ := io.ReadAll(c)
		return string(got)
	}
	seen := map[string]int{}
	for range 10 {
		seen[ask()]++
	}
	if seen["a!"] != 5 || seen["b!"] != 5 {
		t.Errorf("ten connections went to %v, want five to each", seen)
	}
	a.Close()
	for range 10 {
		if got := ask(); got != "b!" {
			t.Errorf("with one server gone a connection gets %q", got)
		}
	}
	b.Close()
	if got := ask(); got != "" {
		t.Errorf("with both servers gone a connection gets %q", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Balance ends with %v", err)
	}
	if err := Balance(t.Context(), "not an address", nil); err == nil {
		t.Error("an address that is none gives no error")
	}
}

// A server that did not answer is tried last for two seconds of a clock that nobody sets, and then like the others.
func TestBalancerAvoids(t *testing.T) {
	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		testenv.Must(t, err)
		t.Cleanup(func() { l.Close() })
		return l
	}
	alive, dead := listen(), listen()
	dead.Close()
	b := newBalancer([]string{dead.Addr().String(), alive.Addr().String()})
	var now time.Duration
	b.running = func() time.Duration { return now }
	for _, step := range []struct{ at, avoided time.Duration }{{0, avoidFor}, {time.Second, avoidFor}, {3 * time.Second, 3*time.Second + avoidFor}} {
		now = step.at
		for range b.servers { // each is the first once
			c, err := b.dial(t.Context())
			testenv.Must(t, err)
			c.Close()
		}
		if until := time.Duration(b.avoid[0].Load()); until != step.avoided || b.avoid[1].Load() != 0 {
			t.Errorf("at %s the dead one is avoided until %s, want %s; the other: %d", step.at, until, step.avoided, b.avoid[1].Load())
		}
	}
}
