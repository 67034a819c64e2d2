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

// A member that is heard of no more has ended, and its node may live: an agent that is replaced or killed is back in
// seconds, and until then its node's kernel carries on. The port tells: a kernel refuses a connection to it, and a machine
// without power says nothing. It is asked again and again, since an agent also ends when its node is switched off.
const (
	askTimeout = 80 * time.Millisecond
	askPause   = 300 * time.Millisecond
	silences   = 2 // so many in a row, and the node is dead
	// awayLimit is for how long an agent may be away: what its node does grows old.
	awayLimit = time.Minute
	// firstPause is after what time an agent is asked again that says that it is there: one that has just said goodbye answers
	// for a moment longer. Each further pause is twice as long, up to askPause.
	firstPause = 20 * time.Millisecond
)

// follow finds out whether a member has gone that is said to have, and if so whether its node lives, and goes on to until the
// member is back. It asks the member itself, and its node: a claim by whoever has the key takes nothing from a node. A dead
// one answers neither, so that this costs no time.
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
			if pause == askPause && !told { // it has not just said goodbye
				told = true
				m.options.Log.Warn("an agent that others say has gone is there: its node keeps its addresses", "node", n.Name)
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
				continue // the question or the answer may be lost
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

// ask asks both at once whether they are there: the member, and the kernel of its node. When the kernel is silent the
// member is not waited for any longer.
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

// setGone notes how it is with a node whose member has gone, unless that has come back since. It says whether to go on.
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

// kernelLives says whether there is a kernel at an address: it takes a connection, or refuses it.
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
