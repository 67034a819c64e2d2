// Package membership says which nodes live, faster than the API server can: the agents ask each other, several times a
// second, and tell each other what they heard (SWIM, with hashicorp/memberlist). A node that loses power is known to be
// gone in about a second, where its Node becomes NotReady after 40. What they say is encrypted, with a key that all have.
package membership

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Where the key is, in the namespace fathom-system.
const (
	Secret    = "fathom-membership"
	SecretKey = "key"
	KeySize   = 32 // AES-256
)

// Port is where members listen, for TCP and UDP.
const Port = 10472

// Options say who a member is.
type Options struct {
	Name string
	Addr netip.Addr // its own, at which others reach it
	Port uint16
	Key  []byte
	Log  *slog.Logger
	// Changed is called when another has come or gone. It must not block.
	Changed func()
	// Lives says whether there is a kernel at an address where a member has ended; nil asks the port.
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
	if len(o.Key) != KeySize {
		return nil, fmt.Errorf("the key in Secret %s has %d bytes, want %d: delete the Secret, and the controller makes another", Secret, len(o.Key), KeySize)
	}
	if o.Lives == nil {
		o.Lives = kernelLives
	}
	m := &Member{options: o, states: map[string]State{}, following: map[string]int{}}
	m.ctx, m.end = context.WithCancel(context.Background())
	c := memberlist.DefaultLANConfig()
	c.Name = o.Name
	c.BindAddr, c.BindPort = o.Addr.String(), int(o.Port)
	c.AdvertiseAddr, c.AdvertisePort = c.BindAddr, c.BindPort
	c.SecretKey = o.Key
	c.ProbeInterval, c.ProbeTimeout, c.GossipInterval = probeInterval, probeTimeout, gossipInterval
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = suspicionMult, 1
	c.TCPTimeout = 2 * time.Second
	c.DeadNodeReclaimTime = reclaim
	c.Events = events{m}
	c.Logger = log.New(logWriter{o.Log}, "", 0)
	var err error
	if m.list, err = memberlist.Create(c); err != nil {
		return nil, fmt.Errorf("listen for other agents at %s: %w", netip.AddrPortFrom(o.Addr, o.Port), err)
	}
	return m, nil
}

// Join makes itself known to members at these addresses, and learns from them of all others. It takes two seconds if
// one does not answer. That none does is no error: the first member has nobody to join.
func (m *Member) Join(ctx context.Context, addrs []netip.Addr) {
	var all sync.WaitGroup
	for _, a := range addrs {
		all.Go(func() {
			if ctx.Err() != nil {
				return
			}
			if _, err := m.list.Join([]string{net.JoinHostPort(a.String(), strconv.Itoa(int(m.options.Port)))}); err != nil {
				m.options.Log.Debug("an agent does not answer yet", "address", a, "error", err)
			}
		})
	}
	all.Wait()
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

// leave notes that a member has gone. What becomes of its node is found out; until then nothing has changed.
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
