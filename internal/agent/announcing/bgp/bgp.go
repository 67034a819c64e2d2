// Package bgp speaks BGP with routers: it announces what is behind this node. It learns nothing: routes that a router
// announces are neither written to the kernel nor passed on.
//
// GoBGP, as a library, implements the protocol. Each peer has its own GoBGP instance, which dials and does not listen. So
// what a router hears depends on its own Peer alone; docs/design/bgp.md.
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

// Options configures a Speaker.
type Options struct {
	Log *slog.Logger
	// Changed is called when a session comes up or goes down. It must not block.
	Changed func()
}

// Speaker holds a node's sessions. Without peers it holds and runs nothing.
type Speaker struct {
	log     *slog.Logger
	changed func()

	mu       sync.Mutex
	sessions map[netip.AddrPort]*session
}

// State is a session's state, in the words of RFC 4271.
type State string

// The states. The zero value means that there is no session.
const (
	Idle        State = "Idle"        // waiting before the next attempt
	Active      State = "Active"      // trying to connect
	OpenSent    State = "OpenSent"    // connected, nothing received yet
	OpenConfirm State = "OpenConfirm" // both OPENs sent, not confirmed yet
	Established State = "Established"
)

// Session describes a session.
type Session struct {
	Peer    string // the name of the Peer
	Address netip.AddrPort
	State   State
	Since   time.Time // when it came up or went down
	// Reason is what went wrong last, if the session is not Established.
	Reason string
	// Routes is the number of announced routes: 0 while the session is not Established.
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

// New returns a Speaker that announces nothing yet.
func New(o Options) *Speaker {
	return &Speaker{log: o.Log, changed: o.Changed, sessions: map[netip.AddrPort]*session{}}
}

// Set makes the speaker announce what is wanted and nothing else. It does not repeat what it announces already. A peer that
// is no longer wanted gets a NOTIFICATION, and drops the routes. A session whose parameters changed restarts gracefully.
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

// Leave cuts all sessions without a message, as a crash would. Routers with graceful restart keep the routes until this
// node's next Speaker has announced them again. To make routers drop the routes, Set an empty bgpconf.Speaker.
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
