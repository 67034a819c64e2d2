package proxy

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
)

// inNamespace runs the test anew in a network namespace of its own, and says whether this is that run.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const env = "FATHOM_TEST_NAMESPACE"
	if os.Getenv(env) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return true
	}
	testenv.NeedRoot(t)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// cache stands for the node's DNS cache.
type cache struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	silent   bool
}

func startCache(t *testing.T, addr string) *cache {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	c := &cache{listener: l}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			c.conns = append(c.conns, conn)
			c.mu.Unlock()
			go c.serve(conn)
		}
	}()
	return c
}

func (c *cache) serve(conn net.Conn) {
	var length [2]byte
	for {
		if _, err := io.ReadFull(conn, length[:]); err != nil {
			return
		}
		query := make([]byte, binary.BigEndian.Uint16(length[:]))
		if _, err := io.ReadFull(conn, query); err != nil {
			return
		}
		query[2] |= 0x80
		c.mu.Lock()
		silent := c.silent
		c.mu.Unlock()
		if !silent {
			_, _ = conn.Write(append(length[:], query...))
		}
	}
}

func (c *cache) stop() {
	_ = c.listener.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		_ = conn.Close()
	}
}

func TestNodeCaches(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	changed := make(chan struct{}, 100)
	n := &nodeCaches{log: slog.New(slog.DiscardHandler), changed: func() { changed <- struct{}{} }, port: 5353}
	defer n.close()
	addr := netip.MustParseAddr("127.0.0.1")
	expect := func(what string, want int) {
		t.Helper()
		for len(n.answering()) != want {
			select {
			case <-changed:
			case <-time.After(20 * time.Second):
				t.Fatalf("%s: %v answer, want %d", what, n.answering(), want)
			}
		}
	}
	n.set(context.Background(), []netip.Addr{addr})
	expect("before there is one", 0)
	c := startCache(t, "127.0.0.1:5353")
	expect("it has come", 1)
	c.stop()
	expect("its process ended", 0)
	c = startCache(t, "127.0.0.1:5353")
	expect("it is back", 1)
	c.mu.Lock()
	c.silent = true
	c.mu.Unlock()
	expect("it hangs", 0)
	c.mu.Lock()
	c.silent = false
	c.mu.Unlock()
	expect("it goes on", 1)
	n.set(context.Background(), nil)
	expect("it is not asked any more", 0)
	c.stop()
}
