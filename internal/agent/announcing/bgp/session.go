package bgp

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/osrg/gobgp/v4/api"
	"github.com/osrg/gobgp/v4/pkg/apiutil"
	"github.com/osrg/gobgp/v4/pkg/config/oc"
	wire "github.com/osrg/gobgp/v4/pkg/packet/bgp"
	"github.com/osrg/gobgp/v4/pkg/server"

	"github.com/fathom-network/fathom/internal/facts/bgpconf"
)

// session keeps up the session with one peer. It is a sequence of lives: a life is a GoBGP instance, which starts before
// the connection and ends after it. A new instance says in its OPEN that it restarts and that forwarding was preserved.
// That is true, since the kernel forwards. Rejected: one instance that reconnects after an interruption. It says that
// forwarding was not preserved, so the router drops the routes it kept, until they are announced again.
type session struct {
	log      *slog.Logger
	changed  func()
	routerID netip.Addr
	stop     chan ending // asks for the end
	done     chan struct{}

	mu   sync.Mutex
	peer bgpconf.Peer
	life *server.BgpServer // nil between two lives
	deaf func()            // ends the life's watch
	// extended is true if the peer said in this life that it takes IPv6 next hops for IPv4 prefixes.
	extended bool
	// unsure holds the routes that GoBGP was given while it may not have sent them, see confirm. It is nil if there are
	// none.
	unsure map[netip.Prefix]bgpconf.Route
	// cause is why the session is about to end, from GoBGP's log: GoBGP reports its own decisions nowhere else.
	cause string
	state Session

	noting sync.Mutex
	noted  string // the last reason that hear has not taken over yet
}

// ending says how a session ends.
type ending bool

const (
	leave    ending = false // the connection is cut
	withdraw ending = true  // the peer gets a NOTIFICATION
)

const (
	// connectRetry is the interval of attempts to connect to a peer that does not answer.
	connectRetry = 3 * time.Second
	// deferral is how long GoBGP announces nothing to a peer that may have kept routes, after the session is up. GoBGP
	// waits for the End-of-RIB of all its peers (RFC 4724, 4.1), and one of the two that it has never sends one.
	deferral = time.Second
	// shortLife is the shortest life after which the next starts without a pause. The pause doubles each time, up to
	// maxPause.
	shortLife = 10 * time.Second
	minPause  = 100 * time.Millisecond // on top of the one to two seconds that GoBGP waits
	maxPause  = 30 * time.Second
	// maxReceived is how many routes of a family a peer may announce. GoBGP holds them, though they are not used, and needs
	// about half a KiB for each.
	maxReceived = 50_000
)

func (s *Speaker) begin(routerID netip.Addr, p bgpconf.Peer) *session {
	one := &session{
		log: s.log.With("peer", p.Name, "address", p.Address), changed: s.changed, routerID: routerID,
		stop: make(chan ending, 1), done: make(chan struct{}), peer: p,
		state: Session{Peer: p.Name, Address: p.Address, State: Active, Since: time.Now()},
	}
	go one.run()
	return one
}

// end ends the session and waits until it has ended.
func (s *session) end(how ending) {
	s.stop <- how
	<-s.done
}

func (s *session) run() {
	defer close(s.done)
	for pause := minPause; ; {
		began := time.Now()
		over := make(chan struct{}, 1)
		err := s.live(over)
		if err != nil {
			s.note(err.Error())
			s.log.Error("BGP", "error", err)
			over <- struct{}{}
		}
		select {
		case how := <-s.stop:
			s.die(how)
			return
		case <-over:
			s.die(leave)
		}
		if pause = min(2*pause, maxPause); time.Since(began) > shortLife && err == nil {
			pause = minPause
		}
		select {
		case <-s.stop:
			return
		case <-time.After(pause):
		}
	}
}

// starting is locked while a GoBGP instance starts: it writes package variables without a lock (v4.8.0:
// table.SelectionOptions, table.UseMultiplePaths). All instances write the same values.
var starting sync.Mutex

func start(ctx context.Context, b *server.BgpServer, g *api.Global) error {
	starting.Lock()
	defer starting.Unlock()
	return b.StartBgp(ctx, &api.StartBgpRequest{Global: g})
}

// live starts a life. over receives a value when the session was up and is no longer.
func (s *session) live(over chan<- struct{}) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear()
	b := server.NewBgpServer(server.LoggerOption(slog.New(&listener{next: s.log.Handler(), note: s.note}), nil))
	go b.Serve()
	ctx, deaf := context.WithCancel(context.Background())
	s.life, s.deaf, s.extended, s.cause, s.unsure = b, deaf, false, "", nil
	if err := start(ctx, b, &api.Global{
		Asn: s.peer.LocalASN, RouterId: s.routerID.String(),
		ListenPort: -1, // no port is opened on the node, where another BGP speaker may have 179
		Families:   families,
	}); err != nil {
		return fmt.Errorf("start BGP: %w", err)
	}
	for _, r := range s.peer.Routes {
		if !extends(s.peer, r) {
			s.tell(r, announce)
		}
	}
	if err := b.WatchEvent(ctx, server.WatchEventMessageCallbacks{
		OnPeerUpdate: func(e *apiutil.WatchEventMessage_PeerEvent, _ time.Time) {
			if e.Type == apiutil.PEER_EVENT_STATE && e.Peer.State.NeighborAddress != absent && s.enter(b, e.Peer.State) {
				select {
				case over <- struct{}{}:
				default:
				}
			}
		},
	}, server.WatchPeer()); err != nil {
		return fmt.Errorf("watch the session: %w", err)
	}
	s.unsure = map[netip.Prefix]bgpconf.Route{}
	if s.peer.RestartTime > 0 {
		if err := b.AddPeer(ctx, &api.AddPeerRequest{Peer: absentee(s.peer)}); err != nil {
			return fmt.Errorf("add the absent peer: %w", err)
		}
	}
	if err := b.AddPeer(ctx, &api.AddPeerRequest{Peer: request(s.peer)}); err != nil {
		return fmt.Errorf("add the peer: %w", err)
	}
	return nil
}

// families lists the families that GoBGP makes tables for. Its default is all that it knows, which takes 10 MiB.
var families = []uint32{
	uint32(oc.AfiSafiTypeToIntMap[oc.AFI_SAFI_TYPE_IPV4_UNICAST]), uint32(oc.AfiSafiTypeToIntMap[oc.AFI_SAFI_TYPE_IPV6_UNICAST]),
}

// die ends a life.
func (s *session) die(how ending) {
	s.mu.Lock()
	b, deaf := s.life, s.deaf
	s.life = nil
	s.mu.Unlock()
	defer deaf()
	if how == leave {
		if err := b.StopBgp(context.Background(), &api.StopBgpRequest{AllowGracefulRestart: true}); err != nil {
			s.log.Warn("BGP did not stop", "error", err)
		}
	}
	b.Stop()
}

// states maps GoBGP's states.
var states = map[wire.FSMState]State{
	wire.BGP_FSM_IDLE: Idle, wire.BGP_FSM_CONNECT: Active, wire.BGP_FSM_ACTIVE: Active, wire.BGP_FSM_OPENSENT: OpenSent,
	wire.BGP_FSM_OPENCONFIRM: OpenConfirm, wire.BGP_FSM_ESTABLISHED: Established,
}

// enter follows a change of state in a life, and returns true if that ends the life.
func (s *session) enter(life *server.BgpServer, p apiutil.PeerState) (over bool) {
	s.mu.Lock()
	if s.life != life { // a late event of the previous life
		s.mu.Unlock()
		return false
	}
	s.hear()
	was, is := s.state.State, states[p.SessionState]
	s.state.State = is
	if !s.extended && takesIPv6NextHops(p.RemoteCap) {
		// GoBGP reports the capabilities only with the state Established. The routes and End-of-RIB follow later: see
		// deferral.
		s.extended = true
		for _, r := range s.peer.Routes {
			if extends(s.peer, r) {
				s.tell(r, announce)
			}
		}
	}
	came, went := is == Established && was != Established, was == Established && is != Established
	if came || went {
		s.state.Since = time.Now()
	}
	switch {
	case came:
		s.state.Reason = ""
		if s.withheld() > 0 {
			s.state.Reason = "IPv4 prefixes are not announced: the link has no IPv4 address, and the router does not accept IPv6 next hops for them (RFC 8950)"
		}
	default:
		s.state.Reason = cmp.Or(s.cause, disconnected(p), s.state.Reason)
	}
	reason := s.state.Reason
	s.mu.Unlock()
	switch {
	case came:
		s.log.Info("BGP session is up")
		go s.confirm(life)
	case went:
		s.log.Warn("BGP session is down", "reason", reason)
	}
	if came || went {
		s.changed()
	}
	return went
}

// note records what went wrong, as the reason that a session is down. GoBGP may hold its locks during the call while a
// caller with s.mu waits for them: so note takes another lock.
func (s *session) note(reason string) {
	s.noting.Lock()
	defer s.noting.Unlock()
	s.noted = reason
}

// hear takes over what was noted since its last call. s.mu is held.
func (s *session) hear() {
	s.noting.Lock()
	reason := s.noted
	s.noted = ""
	s.noting.Unlock()
	switch {
	case reason == "":
	case s.state.State != Established:
		s.state.Reason = reason
	default:
		s.cause = reason
	}
}

func (s *session) look() Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear()
	look := s.state
	if look.State == Established {
		look.Routes = len(s.peer.Routes) - s.withheld()
	}
	return look
}

func (s *session) isUnnumbered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.peer.Unnumbered
}

// speaksLike reports whether the session can continue for p, whatever routes p announces.
func (s *session) speaksLike(routerID netip.Addr, p bgpconf.Peer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := s.peer
	return s.routerID == routerID && have.Name == p.Name && have.Address == p.Address && have.ASN == p.ASN && have.LocalASN == p.LocalASN &&
		have.Password == p.Password && have.HoldTime == p.HoldTime && have.Keepalive == p.Keepalive && have.Hops == p.Hops &&
		have.TTLSecurity == p.TTLSecurity && have.RestartTime == p.RestartTime
}

// announce makes the session announce p's routes and no others.
func (s *session) announce(p bgpconf.Peer, done *Changes) {
	s.mu.Lock()
	defer s.mu.Unlock()
	have := map[netip.Prefix]bgpconf.Route{}
	for _, r := range s.peer.Routes {
		have[r.Prefix] = r
	}
	s.peer = p
	for _, r := range p.Routes {
		old, found := have[r.Prefix]
		delete(have, r.Prefix)
		switch {
		case !found:
			done.RoutesAdded++
		case !old.Like(r):
			done.RoutesReplaced++
		default:
			continue
		}
		s.tell(r, announce)
	}
	for _, r := range have {
		done.RoutesRemoved++
		s.tell(r, revoke)
	}
}

// tell passes a route to GoBGP with what, AddPath or DeletePath. A failure does not affect other routes. s.mu is held.
func (s *session) tell(r bgpconf.Route, what func(*server.BgpServer, bgpconf.Peer, bgpconf.Route) error) {
	if s.life == nil || s.withholds(r) {
		return // the next life starts with all routes
	}
	if s.unsure != nil {
		s.unsure[r.Prefix] = r
	}
	if err := what(s.life, s.peer, r); err != nil {
		s.log.Error("BGP", "error", err)
	}
}

// confirm sends the peer what GoBGP was given while the session came up. GoBGP (v4.8.0) sends the routes that it has, and
// enters the state Established a moment later: a route that is added or withdrawn between the two is neither among the
// first routes nor sent as a change. To a peer that may have kept routes, GoBGP sends neither routes nor changes during
// deferral. confirm sends that peer all routes now, when it is known whether the peer takes IPv6 next hops, and repeats
// afterwards what was withdrawn since.
func (s *session) confirm(life *server.BgpServer) {
	if !s.wait(life, time.Millisecond, func(p *api.Peer) bool { return p.State.SessionState == api.PeerState_SESSION_STATE_ESTABLISHED }) {
		return
	}
	s.mu.Lock()
	if s.life == life && (s.peer.RestartTime > 0 || len(s.unsure) > 0) {
		// All routes: GoBGP does not send a route again if it is added unchanged.
		if err := life.ResetPeer(context.Background(), &api.ResetPeerRequest{Address: "all", Soft: true, Direction: api.ResetPeerRequest_DIRECTION_OUT}); err != nil {
			s.log.Error("BGP", "error", fmt.Errorf("announce the routes: %w", err))
		}
	}
	s.mu.Unlock()
	if !s.wait(life, deferral/10, func(p *api.Peer) bool { return !p.GetGracefulRestart().GetLocalRestarting() }) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life != life {
		return
	}
	unsure := s.unsure
	s.unsure = nil
	for _, r := range s.peer.Routes {
		delete(unsure, r.Prefix)
	}
	for _, r := range unsure { // GoBGP withdraws only routes that it has
		s.tell(r, announce)
		s.tell(r, revoke)
	}
}

// wait polls until is returns true for the peer, and reports whether the session is still up then. GoBGP has no events for
// these states.
func (s *session) wait(life *server.BgpServer, interval time.Duration, is func(*api.Peer) bool) bool {
	for {
		time.Sleep(interval)
		found := false
		if err := life.ListPeer(context.Background(), &api.ListPeerRequest{}, func(p *api.Peer) {
			found = found || p.State.NeighborAddress != absent.String() && is(p)
		}); err != nil {
			return false // the life has ended
		}
		s.mu.Lock()
		up := s.life == life && s.state.State == Established
		s.mu.Unlock()
		if found || !up {
			return up
		}
	}
}

// extends reports whether a route needs a peer that takes IPv6 next hops for IPv4 prefixes.
func extends(p bgpconf.Peer, r bgpconf.Route) bool {
	return r.Prefix.Addr().Is4() && !r.NextHop.IsValid() && p.Address.Addr().Is6()
}

// withholds reports whether a route is not announced because the peer could not use it. s.mu is held.
func (s *session) withholds(r bgpconf.Route) bool { return !s.extended && extends(s.peer, r) }

// withheld returns the number of routes that are not announced because the peer could not use them. s.mu is held.
func (s *session) withheld() int {
	n := 0
	for _, r := range s.peer.Routes {
		if s.withholds(r) {
			n++
		}
	}
	return n
}

// takesIPv6NextHops reports whether the capabilities include RFC 8950's for IPv4.
func takesIPv6NextHops(list []wire.ParameterCapabilityInterface) bool {
	for _, c := range list {
		if x, ok := c.(*wire.CapExtendedNexthop); ok {
			for _, t := range x.Tuples {
				if t.NLRIAFI == wire.AFI_IP && t.NLRISAFI == wire.SAFI_UNICAST && t.NexthopAFI == wire.AFI_IP6 {
					return true
				}
			}
		}
	}
	return false
}

func announce(b *server.BgpServer, p bgpconf.Peer, r bgpconf.Route) error {
	path, err := pathOf(p, r)
	if err == nil {
		_, err = b.AddPath(apiutil.AddPathRequest{Paths: []*apiutil.Path{path}})
	}
	if err != nil {
		return fmt.Errorf("announce %s: %w", r.Prefix, err)
	}
	return nil
}

func revoke(b *server.BgpServer, p bgpconf.Peer, r bgpconf.Route) error {
	path, err := pathOf(p, r)
	if err == nil {
		err = b.DeletePath(apiutil.DeletePathRequest{Paths: []*apiutil.Path{path}})
	}
	if err != nil {
		return fmt.Errorf("withdraw %s: %w", r.Prefix, err)
	}
	return nil
}

// pathOf converts a route to GoBGP's form.
func pathOf(p bgpconf.Peer, r bgpconf.Route) (*apiutil.Path, error) {
	family, hop := wire.RF_IPv4_UC, r.NextHop
	if r.Prefix.Addr().Is6() {
		family = wire.RF_IPv6_UC
	}
	switch {
	// GoBGP writes any address into any route, and an IPv4 next hop of an IPv6 route as ::ffff:192.0.2.1, which no router
	// can use.
	case hop.IsValid() && hop.Is4() != r.Prefix.Addr().Is4(), hop.Is4In6():
		return nil, fmt.Errorf("%s cannot be its next hop", hop)
	case hop.IsValid():
	case extends(p, r):
		hop = netip.IPv6Unspecified() // GoBGP fills in the session's local address
	case r.Prefix.Addr().Is4() != p.Address.Addr().Is4():
		return nil, fmt.Errorf("the session with %s gives it no next hop", p.Address)
	case r.Prefix.Addr().Is4():
		hop = netip.IPv4Unspecified()
	default:
		hop = netip.IPv6Unspecified()
	}
	prefix, err := wire.NewIPAddrPrefix(r.Prefix)
	if err != nil {
		return nil, err
	}
	attrs := []wire.PathAttributeInterface{wire.NewPathAttributeOrigin(wire.BGP_ORIGIN_ATTR_TYPE_IGP)}
	if family == wire.RF_IPv4_UC && hop.Is4() {
		a, err := wire.NewPathAttributeNextHop(hop)
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, a)
	} else {
		a, err := wire.NewPathAttributeMpReachNLRI(family, []wire.PathNLRI{{NLRI: prefix}}, hop)
		if err != nil {
			return nil, err
		}
		attrs = append(attrs, a)
	}
	var standard []uint32
	var large []*wire.LargeCommunity
	for _, c := range r.Communities {
		if c.Large {
			large = append(large, wire.NewLargeCommunity(c.Values[0], c.Values[1], c.Values[2]))
		} else {
			standard = append(standard, c.Standard())
		}
	}
	if len(standard) > 0 {
		attrs = append(attrs, wire.NewPathAttributeCommunities(standard))
	}
	if len(large) > 0 {
		attrs = append(attrs, wire.NewPathAttributeLargeCommunities(large))
	}
	if r.LocalPref != nil && p.ASN == p.LocalASN {
		attrs = append(attrs, wire.NewPathAttributeLocalPref(*r.LocalPref))
	}
	return &apiutil.Path{Family: family, Nlri: prefix, Attrs: attrs, Age: time.Now().Unix()}, nil
}

// absent is the address of a neighbour that never answers: one for documentation (RFC 3849).
var absent = netip.MustParseAddr("2001:db8::")

// absentee is a neighbour that never answers, which makes GoBGP defer its routes. Without it, GoBGP sends End-of-RIB as
// soon as the router has sent its own, possibly before it was given the routes that depend on the router's OPEN.
func absentee(p bgpconf.Peer) *api.Peer {
	f := &api.Family{Afi: api.Family_AFI_IP, Safi: api.Family_SAFI_UNICAST}
	return &api.Peer{
		Conf:            &api.PeerConf{NeighborAddress: absent.String(), PeerAsn: p.ASN, LocalAsn: p.LocalASN, AdminDown: true},
		Transport:       &api.Transport{PassiveMode: true},
		GracefulRestart: &api.GracefulRestart{Enabled: true, RestartTime: uint32(p.RestartTime.Seconds())},
		AfiSafis: []*api.AfiSafi{{
			Config:            &api.AfiSafiConfig{Family: f, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: true}},
		}},
	}
}

// request converts a peer to GoBGP's form.
func request(p bgpconf.Peer) *api.Peer {
	r := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Address.Addr().String(), PeerAsn: p.ASN, LocalAsn: p.LocalASN, AuthPassword: string(p.Password),
		},
		Transport: &api.Transport{RemotePort: uint32(p.Address.Port())},
		Timers: &api.Timers{Config: &api.TimersConfig{
			ConnectRetry: uint64(connectRetry.Seconds()), IdleHoldTimeAfterReset: uint64(connectRetry.Seconds()),
			HoldTime: uint64(p.HoldTime.Seconds()), KeepaliveInterval: uint64(p.Keepalive.Seconds()),
		}},
	}
	switch {
	case p.TTLSecurity: // RFC 5082: packets are sent with TTL 255
		r.TtlSecurity = &api.TtlSecurity{Enabled: true, TtlMin: 256 - uint32(p.Hops)}
	case p.Hops > 1:
		r.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.Hops)}
	}
	restart := p.RestartTime > 0
	if restart {
		r.GracefulRestart = &api.GracefulRestart{
			Enabled: true, RestartTime: uint32(p.RestartTime.Seconds()), DeferralTime: uint32(deferral.Seconds()), LocalRestarting: true,
		}
	}
	// Both families in every session: IPv6 routes may be announced over IPv4, and IPv4 routes over IPv6.
	for _, afi := range []api.Family_Afi{api.Family_AFI_IP, api.Family_AFI_IP6} {
		f := &api.Family{Afi: afi, Safi: api.Family_SAFI_UNICAST}
		r.AfiSafis = append(r.AfiSafis, &api.AfiSafi{
			Config:            &api.AfiSafiConfig{Family: f, Enabled: true},
			MpGracefulRestart: &api.MpGracefulRestart{Config: &api.MpGracefulRestartConfig{Enabled: restart}},
			PrefixLimits:      &api.PrefixLimit{Family: f, MaxPrefixes: maxReceived},
		})
	}
	return r
}
