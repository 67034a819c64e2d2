// Package membership finds out which nodes live, faster than the API server can: the agents probe each other several times
// a second, and share the results (SWIM, with hashicorp/memberlist). A node that loses power is known to be dead after
// about a second; its Node becomes NotReady only after 40. The messages are encrypted with a key that all agents have.
//
// Having the key is not enough to be believed. Only nodes' addresses take part, each with its node's name (gate.go), and
// each member checks for itself whether a node that others report dead has gone (away.go).
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

// Port is the TCP and UDP port on which members listen.
const Port = 10472

// Options configures a member.
type Options struct {
	Name string
	Addr netip.Addr // its own, at which other members reach it
	Port uint16
	// Keys holds the key to encrypt with, followed by others to decrypt with.
	Keys [][]byte
	// Nodes maps the cluster's nodes to their addresses: traffic from other addresses is rejected. See SetNodes.
	Nodes map[string][]netip.Addr
	Log   *slog.Logger
	// Changed is called when another member comes or goes. It must not block.
	Changed func()
	// Lives reports whether a kernel answers at the address of a member that is said to have ended; nil probes the port.
	Lives func(context.Context, netip.AddrPort) bool
}

// State is what a member knows of a node.
type State int

// The states. Unknown is a node that was never heard of. Away is a living node whose agent is not running: its kernel still
// does what the agent configured.
const (
	Unknown State = iota
	Alive
	Away
	Dead
)

// Member is this node's member of the cluster.
type Member struct {
	options Options
	list    *memberlist.Memberlist
	ring    *memberlist.Keyring
	gate    *gate
	ctx     context.Context // ends with the member
	end     func()

	mu        sync.Mutex
	states    map[string]State
	following map[string]int // nodes whose members have gone, and the number of the follow call that runs for each
	followed  int            // calls of follow so far
}

// How fast a node is taken for dead. A member probes it in each interval and waits for the answer until the interval's end,
// with the help of other members. Then the node has a few intervals to refute. That makes about a second.
const (
	probeInterval  = 200 * time.Millisecond
	probeTimeout   = 100 * time.Millisecond
	suspicionMult  = 3
	gossipInterval = 50 * time.Millisecond
	// reclaim is how soon a node that has died may come back with another address.
	reclaim = time.Second
)

// Start starts to listen. The member is alone until Join.
func Start(o Options) (*Member, error) {
	if len(o.Keys) == 0 {
		return nil, errors.New("there is no key for the agents' membership")
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

// SetNodes replaces the set of nodes. A member that is not one of them is no longer heard.
func (m *Member) SetNodes(nodes map[string][]netip.Addr) {
	all := maps.Clone(nodes)
	if all == nil {
		all = map[string][]netip.Addr{}
	}
	// It always admits itself, whatever the API says at the moment.
	all[m.options.Name] = append(slices.Clone(all[m.options.Name]), m.options.Addr)
	m.gate.set(all)
}

// SetKeys changes the keys while the member runs: the key to encrypt with, followed by others to decrypt with.
func (m *Member) SetKeys(keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("there is no key for the agents' membership")
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
				return fmt.Errorf("remove a former key: %w", err)
			}
		}
	}
	return nil
}

// Join contacts members at these addresses, and learns of all others from them. It returns how many answered. An address
// that does not answer takes two seconds. No answer at all is not an error: the first member has no other to join.
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

// State returns what is known of a node. The member's own node lives.
func (m *Member) State(node string) State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.states[node]
}

// Stop ends without a message: the other members have to find out. An agent that ends should call Leave, so that they know
// at once.
func (m *Member) Stop() {
	m.end()
	_ = m.list.Shutdown()
}

// Leave announces the end to the other members, and stops.
func (m *Member) Leave() {
	m.end()
	_ = m.list.Leave(200 * time.Millisecond)
	_ = m.list.Shutdown()
}

// come records that a member is there.
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

// leave records that some member reports another as gone. Nothing changes until follow has found out whether it has, and
// whether its node lives.
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

// logWriter passes on memberlist's log, one line per call.
type logWriter struct{ log *slog.Logger }

var _ io.Writer = logWriter{}

func (w logWriter) Write(line []byte) (int, error) {
	// At debug level: State has what matters, and on a busy machine memberlist complains about delays that turn out
	// harmless.
	w.log.Debug("membership", "what", strings.TrimSpace(string(line)))
	return len(line), nil
}
