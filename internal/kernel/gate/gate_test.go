package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

const port = 6443

// dial begins a connection in the namespace and sends a line.
func dial(t *testing.T, ns *link.Namespace, address, line string) net.Conn {
	t.Helper()
	var c net.Conn
	testenv.Must(t, ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", net.JoinHostPort(address, fmt.Sprint(port)), 10*time.Second)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	_, err := io.WriteString(c, line+"\n")
	testenv.Must(t, err)
	testenv.Must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	return c
}

// A server that comes after its clients has all of their connections, with what they sent.
func TestPass(t *testing.T) {
	testenv.NeedRoot(t)
	ns, path := linktest.NamespaceAt(t)
	linktest.Run(t, ns, "ip", "link", "set", "lo", "up")
	g, err := Open(path, port)
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	testenv.Must(t, err)
	defer g.Close()
	before := []net.Conn{dial(t, ns, "127.0.0.1", "one"), dial(t, ns, "::1", "two"), dial(t, ns, "127.0.0.1", "three")}

	passed := make(chan error)
	go func() { passed <- g.Pass(t.Context()) }()
	server := &Gate{port: port} // listens as a server with SO_REUSEPORT does
	testenv.Must(t, ns.Do(server.listen))
	defer server.listener.Close()
	go func() {
		for {
			c, err := server.listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if line, err := bufio.NewReader(c).ReadString('\n'); err == nil {
					_, _ = io.WriteString(c, "answer to "+line)
				}
			}()
		}
	}()
	testenv.Must(t, <-passed)
	after := dial(t, ns, "127.0.0.1", "four")
	for i, c := range append(before, after) {
		got, err := bufio.NewReader(c).ReadString('\n')
		want := "answer to " + []string{"one", "two", "three", "four"}[i] + "\n"
		if err != nil || got != want {
			t.Errorf("connection %d: %q, %v; want %q", i, got, err, want)
		}
	}
	if value, err := ns.SysctlValue(migrate); err != nil || value != "0" {
		t.Errorf("%s is %s afterwards, %v", migrate, value, err)
	}
}

// Where no server comes, clients hear of it.
func TestNobodyComes(t *testing.T) {
	testenv.NeedRoot(t)
	ns, path := linktest.NamespaceAt(t)
	linktest.Run(t, ns, "ip", "link", "set", "lo", "up")
	g, err := Open(path, port)
	if errors.Is(err, ErrUnsupported) {
		t.Skip(err)
	}
	testenv.Must(t, err)
	c := dial(t, ns, "127.0.0.1", "one")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Pass(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the client reads, %v; want a reset", err)
	}
	g.Close() // once more
}
