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
)

// follow finds out whether the node of a member that has gone lives, and goes on to until the member is back.
func (m *Member) follow(n *memberlist.Node, turn int) {
	addr, _ := netip.AddrFromSlice(n.Addr)
	at := netip.AddrPortFrom(addr.Unmap(), n.Port)
	silent := 0
	for began := time.Now(); time.Since(began) < awayLimit; {
		if m.options.Lives(m.ctx, at) {
			silent = 0
			if !m.setGone(n.Name, turn, Away) {
				return
			}
			select {
			case <-m.ctx.Done():
				return
			case <-time.After(askPause):
			}
			continue
		}
		if silent++; silent == silences {
			break
		}
	}
	m.setGone(n.Name, turn, Dead)
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
