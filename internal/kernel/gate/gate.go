// Package gate lets clients of a server begin before it does. A Gate listens at a port until the server does. Connections that come in are
// the kernel's, which finishes their handshake and keeps what is sent; when the gate closes, it gives them to the server
// (net.ipv4.tcp_migrate_req, Linux 5.14: https://docs.kernel.org/networking/ip-sysctl.html). So clients are answered by their first
// request, as late as there is somebody to answer, and need no second one after a pause.
//
// The server has to set SO_REUSEPORT, and to listen at the same address as the gate, under the same user.
package gate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
)

// ErrUnsupported says that the kernel cannot give a listener's connections to another one.
var ErrUnsupported = errors.New("the kernel has no net.ipv4.tcp_migrate_req (Linux 5.14)")

// Gate is a port at which somebody else is going to listen.
type Gate struct {
	ns       *link.Namespace
	port     uint16
	listener net.Listener
	before   string // the sysctl
}

const migrate = "ipv4/tcp_migrate_req"

// Open opens a gate at a TCP port of all addresses of the network namespace at path. The error is ErrUnsupported if the kernel cannot.
func Open(path string, port uint16) (*Gate, error) {
	ns, err := link.Open(path)
	if err != nil {
		return nil, fmt.Errorf("hold port %d: %w", port, err)
	}
	g := &Gate{ns: ns, port: port}
	if g.before, err = ns.SysctlValue(migrate); errors.Is(err, fs.ErrNotExist) {
		err = ErrUnsupported
	}
	if err == nil {
		err = ns.Sysctl(migrate, "1")
	}
	if err == nil {
		err = ns.Do(g.listen)
	}
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("hold port %d: %w", port, err)
	}
	return g, nil
}

func (g *Gate) listen() (err error) {
	reuse := func(_, _ string, c syscall.RawConn) (err error) {
		if problem := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); problem != nil {
			return problem
		}
		return err
	}
	g.listener, err = (&net.ListenConfig{Control: reuse}).Listen(context.Background(), "tcp", fmt.Sprintf(":%d", g.port))
	return err
}

// look is the time between two looks whether the server listens: the kernel tells nobody.
const look = 5 * time.Millisecond

// Pass returns when a server listens at the port and has the connections. If ctx ends before, they are reset. The gate is closed then.
func (g *Gate) Pass(ctx context.Context) error {
	defer g.Close()
	for {
		listeners, err := g.listeners()
		if err != nil {
			return fmt.Errorf("wait for a server at port %d: %w", g.port, err)
		}
		if listeners > 1 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for a server at port %d: %w", g.port, context.Cause(ctx))
		case <-time.After(look):
		}
	}
}

// Close gives the connections to whoever listens at the port. It may be called again.
func (g *Gate) Close() {
	if g.listener.Close() != nil {
		return // it is closed
	}
	_ = g.ns.Sysctl(migrate, g.before) // the namespace may be gone
	g.ns.Close()
}

// listeners counts who listens at the port, the gate included.
func (g *Gate) listeners() (n int, err error) {
	err = g.ns.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			f, err := os.Open("/proc/thread-self/net/" + name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // a kernel without IPv6
			}
			if err != nil {
				return err
			}
			listen := fmt.Sprintf(":%04X", g.port)
			lines := bufio.NewScanner(f)
			for lines.Scan() {
				// Slot, local address, remote address, state: 0A is TCP_LISTEN.
				field := strings.Fields(lines.Text())
				if len(field) > 3 && strings.HasSuffix(field[1], listen) && field[3] == "0A" {
					n++
				}
			}
			f.Close()
			if err := lines.Err(); err != nil {
				return err
			}
		}
		return nil
	})
	return n, err
}
