// Package bgp speaks BGP with routers: it tells them what is behind this node. It learns nothing from them: what
// they announce is neither put into the kernel nor passed on.
//
// The protocol is GoBGP's, as a library. Each peer has an instance of it to itself, that dials and does not listen,
// so that what a router is told depends on nothing but its own Peer; docs/design/bgp.md.
package bgp

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/fathom-network/fathom/internal/facts/bgpconf"
)

// Options are what a Speaker is told once.
type Options struct {
	Log *slog.Logger
	// Changed is called when a session has come up or gone. It must not block.
	Changed func()
}

// Speaker holds the sessions of a node. Without peers it holds nothing, and runs nothing.
type Speaker struct {
	log     *slog.Logger
	changed func()

	mu       sync.Mutex
	sessions map[netip.AddrPort]*session
}

// State is that of a session, in the words of RFC 4271.
type State string

// The states. The zero value is of no session.
const (
	Idle        State = "Idle"        // waiting before it tries again
	Active      State = "Active"      // trying to connect
	OpenSent    State = "OpenSent"    // connected, and heard nothing yet
	OpenConfirm State = "OpenConfirm" // agreed, and not confirmed
	Established State = "Established"
)

// Session is what is to be known of one.
type Session struct {
	Peer    string // the name of the Peer
	Address netip.AddrPort
	State   State
	Since   time.Time // when it came up, or went
	// Reason says, of one that is not Established, what went wrong last.
	Reason string
	// Routes is how many are announced: none while the session is not Established.
	Routes int
}

// Changes counts what Set did.
type Changes struct {
	PeersAdded, PeersReplaced, PeersRemoved    int
	RoutesAdded, RoutesReplaced, RoutesRemoved int
}

// Total is the number of changes.
func (c Changes) Total() int {
	return c.PeersAdded + c.PeersReplaced + c.PeersRemoved + c.RoutesAdded + c.RoutesReplaced + c.RoutesRemoved
}

// New makes a Speaker that says nothing yet.
func New(o Options) *Speaker {
	return &Speaker{log: o.Log, changed: o.Changed, sessions: map[netip.AddrPort]*session{}}
}

// Set has the speaker say what is wanted and nothing else. What is said already is not said again. A peer that is
// no longer wanted is told that it is over, and drops the routes. One whose session has other parameters than before
// sees a graceful restart.
func (s *Speaker) Set(ctx context.Context, want bgpconf.Speaker) Changes {
	s.mu.Lock()
	defer s.mu.Unlock()
	var done Changes
	keep := map[netip.AddrPort]bool{}
	for _, p := range want.Peers {
		keep[p.Address] = true
	}
	moved := map[netip.AddrPort]bool{}
	for _, p := range want.Peers {
		if s.sessions[p.Address] == nil && p.Unnumbered {
			for a, have := range s.sessions {
				if !keep[a] && have.isUnnumbered() && a.Addr().Zone() == p.Address.Addr().Zone() {
					// The router on the link has another address. It keeps the routes, as it does when an agent restarts.
					have.end(leave)
					delete(s.sessions, a)
					moved[p.Address] = true
				}
			}
		}
		have := s.sessions[p.Address]
		switch {
		case have == nil:
			s.sessions[p.Address] = s.begin(want.RouterID, p)
			if moved[p.Address] {
				done.PeersReplaced++
			} else {
				done.PeersAdded++
			}
		case !have.speaksLike(want.RouterID, p):
			have.end(leave)
			s.sessions[p.Address] = s.begin(want.RouterID, p)
			done.PeersReplaced++
		default:
			have.announce(p, &done)
		}
	}
	for a, have := range s.sessions {
		if !keep[a] {
			have.end(withdraw)
			delete(s.sessions, a)
			done.PeersRemoved++
		}
	}
	if done.Total() > 0 {
		s.log.LogAttrs(ctx, slog.LevelInfo, "BGP", slog.Any("changes", done))
	}
	return done
}

// Sessions returns the state of every session, ordered by the peers' names.
func (s *Speaker) Sessions() []Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Session
	for _, one := range s.sessions {
		all = append(all, one.look())
	}
	slices.SortFunc(all, func(a, b Session) int {
		return cmp.Or(cmp.Compare(a.Peer, b.Peer), a.Address.Compare(b.Address))
	})
	return all
}

// Leave ends all sessions as a crash would, without a word: routers with graceful restart keep the routes until the
// next Speaker of this node has announced them again. To have them dropped, Set an empty bgpconf.Speaker.
func (s *Speaker) Leave() { s.endAll(leave) }

func (s *Speaker) endAll(how ending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var wg sync.WaitGroup
	for a, one := range s.sessions {
		wg.Go(func() { one.end(how) })
		delete(s.sessions, a)
	}
	wg.Wait()
}
