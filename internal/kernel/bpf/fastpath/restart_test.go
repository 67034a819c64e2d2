package fastpath_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// flow sends numbered packets all the time and wants every one of them back.
type flow struct {
	conn    net.Conn
	stop    chan struct{}
	sending sync.WaitGroup
	sent    atomic.Uint32
	got     atomic.Uint32 // different ones
}

// underWay is how many packets have no answer yet, at most: on a busy machine sockets would overflow.
const underWay = 100

func newFlow(t testing.TB, from pod, to netip.Addr) *flow {
	t.Helper()
	c, err := dial(from.Namespace, "udp", to, 8080)
	testenv.Must(t, err)
	testenv.Must(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
	f := &flow{conn: c, stop: make(chan struct{})}
	go func() {
		b, known := make([]byte, 4), map[uint32]bool{}
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			if n := binary.BigEndian.Uint32(b); !known[n] {
				known[n] = true
				f.got.Add(1)
			}
		}
	}()
	f.sending.Go(func() {
		for {
			select {
			case <-f.stop:
				return
			case <-time.After(time.Millisecond):
			}
			if f.sent.Load()-f.got.Load() < underWay {
				_, _ = c.Write(binary.BigEndian.AppendUint32(nil, f.sent.Add(1)))
			}
		}
	})
	return f
}

func (f *flow) end(t testing.TB, what string) {
	t.Helper()
	defer f.conn.Close()
	close(f.stop)
	f.sending.Wait()
	testenv.Eventually(t, what+": every packet is answered", func() (bool, string) {
		sent, got := f.sent.Load(), f.got.Load()
		return sent == got && sent >= 10, fmt.Sprintf("%d of %d were", got, sent)
	})
}

// connection writes and reads in turn, all the time. It notes the longest that an answer took.
type connection struct {
	stop    chan struct{}
	done    chan error
	turns   int
	longest time.Duration
}

func newConnection(t testing.TB, from pod, to netip.Addr) *connection {
	t.Helper()
	c, err := dial(from.Namespace, "tcp", to, 8080)
	testenv.Must(t, err)
	x := &connection{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		defer c.Close()
		b := make([]byte, 64)
		for {
			select {
			case <-x.stop:
				x.done <- nil
				return
			default:
			}
			began := time.Now()
			if _, err := c.Write(b); err != nil {
				x.done <- err
				return
			}
			if _, err := c.Read(b); err != nil {
				x.done <- err
				return
			}
			x.turns++
			x.longest = max(x.longest, time.Since(began))
			time.Sleep(time.Millisecond)
		}
	}()
	return x
}

func (x *connection) end(t testing.TB, what string) {
	t.Helper()
	close(x.stop)
	if err := <-x.done; err != nil {
		t.Errorf("%s: the connection broke: %v", what, err)
	}
	// A packet that was lost is sent again after 200 ms at the least.
	if x.longest > 190*time.Millisecond {
		t.Logf("%s: an answer took %v, on a busy machine or after a loss", what, x.longest)
	}
}

// TestRestart takes the loader away and brings it back, and another version of it, while packets flow.
func TestRestart(t *testing.T) {
	a, b, pods := twoNodes(t, podnet.Direct, fastpath.Options{})
	for i := range 2 {
		serve(t, pods[1][i])
		serve(t, pods[0][i])
	}
	for _, step := range []struct {
		what string
		do   func(n *node)
	}{
		{"the same version", func(n *node) {
			n.path.Close()
			n.open(t)
			if c := n.set(t); c.Total() != 0 {
				t.Errorf("a restart changes %v", c)
			}
		}},
		{"other maps", func(n *node) {
			n.path.Close()
			for _, name := range []string{pin.Pods, pin.Ports, pin.Remotes, pin.Counts} {
				testenv.Must(t, os.Remove(filepath.Join(n.opts.Dir, name)))
			}
			n.open(t)
			if c := n.set(t); c.Programs.Corrected != 3 {
				t.Errorf("another version changes %v", c)
			}
		}},
		{"nothing is pinned any more", func(n *node) {
			n.path.Close()
			testenv.Must(t, os.RemoveAll(n.opts.Dir))
			n.open(t)
			n.set(t)
		}},
		{"off", func(n *node) { n.plan.Fast = false; n.set(t) }},
		{"on", func(n *node) { n.plan.Fast = true; n.set(t) }},
		{"removed", func(n *node) { n.path.Close(); testenv.Must(t, fastpath.Remove(n.Namespace, n.opts.Dir)) }},
		{"back", func(n *node) { n.open(t); n.set(t) }},
	} {
		var flows []*flow
		var connections []*connection
		for family := range 2 {
			for _, way := range [][2]pod{{pods[0][0], pods[1][0]}, {pods[0][0], pods[0][1]}, {pods[1][1], pods[0][1]}} {
				testenv.Must(t, echo(way[0].Namespace, "udp", way[1].addrs[family], 8080, 100)) // neighbours are asked for once
				flows = append(flows, newFlow(t, way[0], way[1].addrs[family]))
				connections = append(connections, newConnection(t, way[0], way[1].addrs[family]))
			}
		}
		for _, n := range []*node{a, b} {
			time.Sleep(50 * time.Millisecond)
			step.do(n)
			time.Sleep(50 * time.Millisecond)
		}
		for i := range flows {
			flows[i].end(t, fmt.Sprintf("%s, UDP %d", step.what, i))
			connections[i].end(t, fmt.Sprintf("%s, TCP %d", step.what, i))
		}
		a.noneInvalid(t)
		b.noneInvalid(t)
	}
	c := a.counted(t, func() { testenv.Must(t, echo(pods[0][0].Namespace, "tcp", pods[1][0].addrs[0], 8080, 1000)) })
	has(t, "after all", c, "redirected to_node", "redirected from_node")
}
