package membership

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sys/unix"
)

// A member that no longer answers has ended, but its node may live. An agent that is replaced or killed is back in seconds,
// and until then its node's kernel forwards. The port tells the two apart: a living kernel refuses a connection to it, and
// a machine without power does not answer. The port is tried repeatedly, since an agent also ends when its node is switched
// off.
const (
	askTimeout = 80 * time.Millisecond
	askPause   = 300 * time.Millisecond
	silences   = 2 // attempts in a row without an answer that make a node dead
	// awayLimit is how long an agent may be away: without it, its node's state becomes outdated.
	awayLimit = time.Minute
	// firstPause is the pause before an agent that still answers is asked again, since one that has just said goodbye
	// answers for a moment longer. Each further pause doubles, up to askPause.
	firstPause = 20 * time.Millisecond
)

// follow finds out whether a member that is said to have gone has gone, and if so whether its node lives. It continues
// until the member is back. It asks both the member and its node, so that a false claim by a holder of the key takes
// nothing from a node. This costs no time for a dead node, which answers neither.
func (m *Member) follow(n *memberlist.Node, turn int) {
	addr, _ := netip.AddrFromSlice(n.Addr)
	at := netip.AddrPortFrom(addr.Unmap(), n.Port)
	silent, missed, pause, told := 0, 0, firstPause, false
	for began := time.Now(); time.Since(began) < awayLimit; {
		member, kernel := m.ask(n.Name, at)
		state := Away
		switch {
		case member:
			state, began, missed = Alive, time.Now(), 0
			if pause == askPause && !told { // it has not merely just said goodbye
				told = true
				m.options.Log.Warn("other agents report that this agent has gone, but it answers; its node keeps its addresses", "node", n.Name)
			}
		case !kernel:
			if silent++; silent == silences {
				m.setGone(n.Name, turn, Dead)
				return
			}
			continue
		default:
			silent = 0
			if missed++; missed < silences {
				continue // the packet or its answer may have been lost
			}
			pause = askPause
		}
		silent = 0
		if !m.setGone(n.Name, turn, state) {
			return
		}
		select {
		case <-m.ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, askPause)
	}
	m.setGone(n.Name, turn, Dead)
}

// ask asks the member and the kernel of its node at the same time whether they live. When the kernel does not answer, it
// does not wait for the member any longer.
func (m *Member) ask(name string, at netip.AddrPort) (member, kernel bool) {
	pinged, asked := make(chan bool, 1), make(chan bool, 1)
	go func() {
		_, err := m.list.Ping(name, net.UDPAddrFromAddrPort(at))
		pinged <- err == nil
	}()
	go func() { asked <- m.options.Lives(m.ctx, at) }()
	select {
	case member = <-pinged:
		if member {
			return true, true
		}
		return false, <-asked
	case kernel = <-asked:
		if kernel {
			return <-pinged, true
		}
	}
	select {
	case member = <-pinged:
	default:
	}
	return member, member
}

// setGone records the state of a node whose member has gone, unless the member has come back since. It reports whether
// follow should continue.
func (m *Member) setGone(node string, turn int, s State) bool {
	m.mu.Lock()
	following := m.following[node] == turn
	changed := following && m.states[node] != s
	if following {
		m.states[node] = s
		if s == Dead {
			delete(m.following, node)
		}
	}
	m.mu.Unlock()
	if changed {
		m.options.Changed()
	}
	return following
}

// kernelLives reports whether a kernel answers at an address: it accepts a connection or refuses it.
func kernelLives(ctx context.Context, at netip.AddrPort) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", at.String())
	if err == nil {
		conn.Close()
		return true
	}
	return errors.Is(err, unix.ECONNREFUSED)
}
