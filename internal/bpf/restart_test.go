package bpf_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/bpf"
	"github.com/fathom-network/fathom/internal/bpf/pin"
	"github.com/fathom-network/fathom/internal/podnet"
	"github.com/fathom-network/fathom/internal/testenv"
)

// flow sends numbered packets all the time and wants every one of them back.
type flow struct {
	conn net.Conn
	stop chan struct{}
	wg   sync.WaitGroup
	sent uint32
	got  map[uint32]bool
}

func newFlow(t testing.TB, from pod, to netip.Addr) *flow {
	t.Helper()
	c, err := dial(from.Namespace, "udp", to, 8080)
	testenv.Must(t, err)
	f := &flow{conn: c, stop: make(chan struct{}), got: map[uint32]bool{}}
	f.wg.Go(func() {
		b := make([]byte, 4)
		for {
			if _, err := c.Read(b); err != nil {
				return
			}
			f.got[binary.BigEndian.Uint32(b)] = true
		}
	})
	f.wg.Go(func() {
		for {
			select {
			case <-f.stop:
				time.Sleep(300 * time.Millisecond)
				c.Close()
				return
			case <-time.After(time.Millisecond):
			}
			f.sent++
			_, _ = c.Write(binary.BigEndian.AppendUint32(nil, f.sent))
		}
	})
	return f
}

func (f *flow) end(t testing.TB, what string) {
	t.Helper()
	close(f.stop)
	f.wg.Wait()
	if lost := int(f.sent) - len(f.got); lost > 0 || f.sent < 10 {
		t.Errorf("%s: %d of %d packets were lost", what, lost, f.sent)
	}
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
	a, b, pods := twoNodes(t, podnet.Direct, bpf.Options{})
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
		{"removed", func(n *node) { n.path.Close(); testenv.Must(t, bpf.Remove(n.Namespace, n.opts.Dir)) }},
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
