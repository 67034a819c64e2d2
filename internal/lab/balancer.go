package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// BalancerCommand is the hidden command of fathom that runs Balance.
const BalancerCommand = "api-balancer"

// startBalancer runs the balancer of a cluster with several control-plane nodes in the lab's core, if it
// is not running.
func (l *Lab) startBalancer(ctx context.Context, c *topology.Cluster) error {
	if len(c.ControlPlanes()) == 1 {
		return nil
	}
	group := l.cgroup("balancer-" + c.Name)
	if pids, err := cgroup.Procs(group); err != nil || len(pids) > 0 {
		return err
	}
	if err := cgroup.Create(group); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{exe, BalancerCommand, netip.AddrPortFrom(l.APIAddr(c), apiPort).String()}
	planes := c.ControlPlanes()
	for i := range planes {
		args = append(args, netip.AddrPortFrom(l.NodeAddrs(c, &planes[i])[0], apiPort).String())
	}
	log, err := os.OpenFile(l.dir("balancer-"+c.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer log.Close()
	dir, err := cgroup.Open(group)
	if err != nil {
		return err
	}
	cmd := &exec.Cmd{Path: exe, Args: args, Dir: "/", Stdout: log, Stderr: log, SysProcAttr: &syscall.SysProcAttr{Setsid: true}}
	if dir != nil {
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	core, err := link.Open(l.netnsPath(coreName))
	if err != nil {
		return err
	}
	defer core.Close()
	if err := core.Start(cmd); err != nil {
		return fmt.Errorf("start the API balancer of cluster %s: %w", c.Name, err)
	}
	go func() { _ = cmd.Wait() }()
	return cgroup.Add(group, cmd.Process.Pid)
}

const (
	dialTimeout = time.Second
	// A server that could not be reached is tried last for this long.
	avoidFor = 2 * time.Second
)

// Balance accepts TCP connections and carries each to one of the servers in turn, the next one if a server
// does not answer. It ends with ctx. It is what stands before the API servers of a lab where a cloud has
// its load balancer.
func Balance(ctx context.Context, listen string, servers []string) error {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		return fmt.Errorf("balance: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	b := newBalancer(servers)
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return fmt.Errorf("balance: %w", err)
		}
		go b.carry(ctx, conn.(*net.TCPConn))
	}
}

type balancer struct {
	servers []string
	avoid   []atomic.Int64 // until when, as running tells it; 0 for one that answers
	next    atomic.Uint64
	// running is the time since the start: the wall clock steps, and one that steps back would have a server avoided
	// for as long as that.
	running func() time.Duration
}

func newBalancer(servers []string) *balancer {
	began := time.Now()
	return &balancer{servers: servers, avoid: make([]atomic.Int64, len(servers)), running: func() time.Duration { return time.Since(began) }}
}

// dial tries the servers that answered last first, then the others.
func (b *balancer) dial(ctx context.Context) (*net.TCPConn, error) {
	first := int(b.next.Add(1) % uint64(len(b.servers)))
	var problems []string
	now := int64(b.running())
	for _, avoided := range []bool{false, true} {
		for i := range b.servers {
			s := (first + i) % len(b.servers)
			if (b.avoid[s].Load() > now) != avoided {
				continue
			}
			d := net.Dialer{Timeout: dialTimeout}
			c, err := d.DialContext(ctx, "tcp", b.servers[s])
			if err == nil {
				return c.(*net.TCPConn), nil
			}
			b.avoid[s].Store(int64(b.running() + avoidFor))
			problems = append(problems, err.Error())
		}
	}
	return nil, errors.New(strings.Join(problems, "; "))
}

func (b *balancer) carry(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	server, err := b.dial(ctx)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s no server for %s: %v\n", time.Now().Format(time.RFC3339), client.RemoteAddr(), err)
		_ = client.SetLinger(0) // a reset: the client sees a refusal, and not an answer that ends early
		return
	}
	defer server.Close()
	// A server that loses power sends nothing more: its silence has to be noticed.
	_ = unixTimeout(server, 5*time.Second)
	var wg sync.WaitGroup
	wg.Go(func() { pipe(server, client) })
	pipe(client, server)
	wg.Wait()
}

// pipe copies until from ends, and passes the end on. Any error ends both directions.
func pipe(to, from *net.TCPConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	_ = to.CloseWrite()
}

// unixTimeout has the kernel give a connection up whose data or keep-alives stay unanswered for so long.
func unixTimeout(c *net.TCPConn, d time.Duration) error {
	if err := c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: d / 2, Interval: d / 5, Count: 3}); err != nil {
		return err
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}
