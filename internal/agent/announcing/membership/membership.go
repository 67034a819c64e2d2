// Package membership says which nodes live, faster than the API server can: the agents ask each other, several times a
// second, and tell each other what they heard (SWIM, with hashicorp/memberlist). A node that loses power is known to be
// gone in about a second, where its Node becomes NotReady after 40. What they say is encrypted, with a key that all have.
//
// Whoever has the key is not believed for that: only nodes' addresses take part, each with its node's name (gate.go), and
// each member finds out by itself whether a node has gone that others say has (away.go).
package membership

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/fathom-network/fathom/internal/facts/keyset"
)

// Port is where members listen, for TCP and UDP.
const Port = 10472

// Options say who a member is.
type Options struct {
	Name string
	Addr netip.Addr // its own, at which others reach it
	Port uint16
	// Keys are the one to encrypt with, and others to understand.
	Keys [][]byte
	// Nodes are the nodes that there are, with their addresses: nobody else is let in. See SetNodes.
	Nodes map[string][]netip.Addr
	Log   *slog.Logger
	// Changed is called when another has come or gone. It must not block.
	Changed func()
	// Lives says whether there is a kernel at an address of which it is said that its member has ended; nil asks the port.
	Lives func(context.Context, netip.AddrPort) bool
}

// State is what is known of a node.
type State int

// The states. Unknown is of a node that was never heard of. Away is the agent, and its node lives: what it has told its
// kernel to do is done.
const (
	Unknown State = iota
	Alive
	Away
	Dead
)

// Member is one of those who ask each other.
type Member struct {
	options Options
	list    *memberlist.Memberlist
	ring    *memberlist.Keyring
	gate    *gate
	ctx     context.Context // ends with the member
	end     func()

	mu        sync.Mutex
	states    map[string]State
	following map[string]int // nodes whose members have gone, and by which call of follow
	followed  int            // calls of it
}

// How fast a node is taken for dead: it is asked in each interval by someone; the answer is waited for until the
// interval's end, with the help of others; then there is time to contradict, a few intervals. That makes about a second.
const (
	probeInterval  = 200 * time.Millisecond
	probeTimeout   = 100 * time.Millisecond
	suspicionMult  = 3
	gossipInterval = 50 * time.Millisecond
	// reclaim is after what time a node that has died may come back with another address.
	reclaim = time.Second
)

// Start begins to listen, alone until Join.
func Start(o Options) (*Member, error) {
	if len(o.Keys) == 0 {
		return nil, errors.New("there is no key by which agents know each other")
	}
	ring, err := memberlist.NewKeyring(o.Keys, o.Keys[0])
	if err != nil {
		return nil, fmt.Errorf("the keys in Secret %s: %w", keyset.Secret, err)
	}
	if o.Lives == nil {
		o.Lives = kernelLives
	}
	m := &Member{options: o, ring: ring, gate: &gate{log: o.Log, port: o.Port, told: map[netip.Addr]bool{}}, states: map[string]State{}, following: map[string]int{}}
	m.SetNodes(o.Nodes)
	m.ctx, m.end = context.WithCancel(context.Background())
	c := memberlist.DefaultLANConfig()
	c.Name = o.Name
	c.BindAddr, c.BindPort = o.Addr.String(), int(o.Port)
	c.AdvertiseAddr, c.AdvertisePort = c.BindAddr, c.BindPort
	c.Keyring = ring
	c.ProbeInterval, c.ProbeTimeout, c.GossipInterval = probeInterval, probeTimeout, gossipInterval
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = suspicionMult, 1
	c.TCPTimeout = 2 * time.Second
	c.DeadNodeReclaimTime = reclaim
	c.Events, c.Alive = events{m}, m.gate
	c.Logger = log.New(logWriter{o.Log}, "", 0)
	listen, err := newTransport(&memberlist.NetTransportConfig{BindAddrs: []string{c.BindAddr}, BindPort: c.BindPort, Logger: c.Logger}, o.Addr, m.gate)
	if err == nil {
		c.Transport = listen
		if m.list, err = memberlist.Create(c); err != nil {
			_ = listen.Shutdown()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("listen for other agents at %s: %w", netip.AddrPortFrom(o.Addr, o.Port), err)
	}
	return m, nil
}

// SetNodes says which nodes there are. Members that are there already, and are none of them, are heard of no more.
func (m *Member) SetNodes(nodes map[string][]netip.Addr) {
	all := maps.Clone(nodes)
	if all == nil {
		all = map[string][]netip.Addr{}
	}
	// Of itself it is certain, whatever the API says at the moment.
	all[m.options.Name] = append(slices.Clone(all[m.options.Name]), m.options.Addr)
	m.gate.set(all)
}

// SetKeys changes the keys while the member goes on: the one to encrypt with, and others to understand.
func (m *Member) SetKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("there is no key by which agents know each other")
	}
	for _, k := range keys {
		if err := m.ring.AddKey(k); err != nil {
			return fmt.Errorf("the keys in Secret %s: %w", keyset.Secret, err)
		}
	}
	if err := m.ring.UseKey(keys[0]); err != nil {
		return fmt.Errorf("the keys in Secret %s: %w", keyset.Secret, err)
	}
	for _, k := range slices.Clone(m.ring.GetKeys()) {
		if !slices.ContainsFunc(keys, func(x []byte) bool { return bytes.Equal(x, k) }) {
			if err := m.ring.RemoveKey(k); err != nil {
				return fmt.Errorf("forget a key of before: %w", err)
			}
		}
	}
	return nil
}

// Join makes itself known to members at these addresses, and learns from them of all others. It takes two seconds if
// one does not answer. That none does is no error: the first member has nobody to join. It says how many did.
func (m *Member) Join(ctx context.Context, addrs []netip.Addr) int {
	var all sync.WaitGroup
	var joined atomic.Int64
	for _, a := range addrs {
		all.Go(func() {
			if ctx.Err() != nil {
				return
			}
			n, err := m.list.Join([]string{net.JoinHostPort(a.String(), strconv.Itoa(int(m.options.Port)))})
			if joined.Add(int64(n)); err != nil {
				m.options.Log.Debug("an agent does not answer yet", "address", a, "error", err)
			}
		})
	}
	all.Wait()
	return int(joined.Load())
}

// State says what is known of a node. The member itself lives.
func (m *Member) State(node string) State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.states[node]
}

// Stop goes without a word: others find out. An agent that ends had better say so with Leave, for others to know at once.
func (m *Member) Stop() {
	m.end()
	_ = m.list.Shutdown()
}

// Leave tells the others, and goes.
func (m *Member) Leave() {
	m.end()
	_ = m.list.Leave(200 * time.Millisecond)
	_ = m.list.Shutdown()
}

// come notes that a member is there.
func (m *Member) come(node string) {
	m.mu.Lock()
	same := m.states[node] == Alive
	m.states[node] = Alive
	delete(m.following, node)
	m.mu.Unlock()
	if !same {
		m.options.Changed()
	}
}

// leave notes that a member is said to have gone, by whomever. Whether it has, and what becomes of its node, is found out;
// until then nothing has changed.
func (m *Member) leave(n *memberlist.Node) {
	m.mu.Lock()
	m.followed++
	turn := m.followed
	m.following[n.Name] = turn
	m.mu.Unlock()
	go m.follow(n, turn)
}

// events implements memberlist.EventDelegate.
type events struct{ m *Member }

func (e events) NotifyJoin(n *memberlist.Node)   { e.m.come(n.Name) }
func (e events) NotifyUpdate(n *memberlist.Node) { e.m.come(n.Name) }
func (e events) NotifyLeave(n *memberlist.Node) {
	if n.Name != e.m.options.Name {
		e.m.leave(n)
	}
}

// logWriter passes on what memberlist logs, a line a call.
type logWriter struct{ log *slog.Logger }

var _ io.Writer = logWriter{}

func (w logWriter) Write(line []byte) (int, error) {
	// What matters of it is known by State, and a busy machine makes it complain of what it then finds to be well.
	w.log.Debug("membership", "what", strings.TrimSpace(string(line)))
	return len(line), nil
}
