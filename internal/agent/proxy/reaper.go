package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// reaper ends flows that lead to an address that is no longer an endpoint, so that their clients reconnect. Such a flow is
// an entry of connection tracking, which sends the client's packets to the old endpoint for as long as the client keeps
// sending; or a socket that connect() translated to an endpoint, whose program would wait for an answer.
//
// The reaper compares all flows with the endpoints: one second after each change, and then at growing intervals. Rejected:
// ending the flows of each endpoint that goes. That would miss endpoints that went while no agent was running, and flows
// that a rule created just before it was changed. Rejected: a comparison every second, since the kernel walks its whole
// table for each, which takes 13 ms with the usual 262,144 buckets.
type reaper struct {
	paths  Paths
	log    *slog.Logger
	counts *metrics
	kick   wake.Signal

	mu      sync.Mutex
	index   *service.Index // nil while Services are unknown
	connect *connect.Translator
	lives   service.Lives
	// departures returns how many pods that were endpoints have gone.
	departures func() uint64
	// seen holds departures before the last sweep of entries and before the one before that.
	seen [2]uint64

	conntrack *conntrack.Table
	complaint string
}

func newReaper(paths Paths, log *slog.Logger, counts *metrics) *reaper {
	return &reaper{paths: paths, log: log, counts: counts, kick: wake.New()}
}

// replace takes a new plan. Endpoints that went while no agent was running have waited, so their flows wait until the start
// is over.
func (r *reaper) replace(plan service.Plan, ranges []netip.Prefix, others []netip.Addr, translator *connect.Translator, lives service.Lives, departures func() uint64) {
	r.mu.Lock()
	first := r.index == nil
	if first {
		r.index = service.NewIndex(plan, ranges, others)
	} else {
		r.index.Replace(plan, ranges, others)
	}
	r.connect, r.lives, r.departures = translator, lives, departures
	r.mu.Unlock()
	if first {
		time.AfterFunc(sweepAgain, r.kick.Set)
	} else {
		r.kick.Set()
	}
}

// apply takes changes to the plan.
func (r *reaper) apply(changes []service.Change) {
	r.mu.Lock()
	for _, c := range changes {
		r.index.Apply(c)
	}
	r.mu.Unlock()
	r.kick.Set()
}

// forget makes the reaper idle.
func (r *reaper) forget() {
	r.mu.Lock()
	r.index, r.connect = nil, nil
	r.mu.Unlock()
}

const (
	// Flows are compared sweepAgain after a change, then after twice that, and so on up to every sweepSeldom. A slow sweep
	// makes the interval longer: sweeps take at most one sweepShare of the time. 100,000 flows take a quarter of a second.
	sweepAgain  = time.Second
	sweepSeldom = 30 * time.Second
	sweepShare  = 100
	// While Services change continuously, sweeps take at most one busyShare of the time. At least sweepPause passes between
	// two, and at most sweepDelay plus the time of a sweep, so that stale flows end within a second.
	busyShare  = 20
	sweepPause = 100 * time.Millisecond
	sweepDelay = 500 * time.Millisecond
)

// seldom returns how long to wait for a change before the next sweep. took is how long the last sweep took. last is the
// wait before it, or 0 if a change caused it or if it failed.
func seldom(last, took time.Duration) time.Duration {
	return max(sweepAgain, min(2*last, sweepSeldom), sweepShare*took)
}

// pause returns how long to wait after a sweep that took so long, even if something changes.
func pause(took time.Duration) time.Duration {
	return max(sweepPause, min(busyShare*took, sweepDelay), took)
}

func (r *reaper) run(ctx context.Context) {
	for next := time.Duration(0); ; {
		last := next
		select {
		case <-ctx.Done():
			if r.conntrack != nil {
				r.conntrack.Close()
			}
			return
		case <-r.kick:
			last = 0
		case <-time.After(next):
		}
		began := time.Now()
		err := errors.Join(r.sweepEntries(ctx), r.sweepSockets(ctx))
		complaint := ""
		if err != nil && ctx.Err() == nil {
			complaint, last = answer.OneLine(err), 0
		}
		if complaint != "" && complaint != r.complaint { // logged once, not at each sweep
			r.log.Warn("cannot end stale flows", "error", complaint)
		}
		r.complaint = complaint
		took := time.Since(began)
		select {
		case <-ctx.Done():
		case <-time.After(pause(took)):
		}
		next = seldom(last, took)
	}
}

// sweepEntries ends entries of connection tracking.
func (r *reaper) sweepEntries(ctx context.Context) error {
	r.mu.Lock()
	idle := r.index == nil
	protocols := []service.Protocol{service.UDP, service.SCTP}
	if !idle {
		// TCP entries go stale only when a pod goes, and on nodes with many connections they are most of the work. They are
		// swept twice, for flows that a rule created just before it was changed.
		gone := r.departures()
		if gone != r.seen[1] {
			protocols = append(protocols, service.TCP)
		}
		r.seen = [2]uint64{gone, r.seen[0]}
	}
	r.mu.Unlock()
	if idle {
		return nil
	}
	if r.conntrack == nil {
		var err error
		if r.conntrack, err = conntrack.OpenTable(link.OwnNetNS); err != nil {
			return err
		}
	}
	deleted, err := r.conntrack.Sweep(ctx, protocols, r.staleEntry)
	r.counts.ended.WithLabelValues("entry").Add(float64(deleted))
	if deleted > 0 {
		r.log.Info("ended stale flows of connection tracking", "number", deleted)
	}
	if err != nil {
		r.conntrack.Close()
		r.conntrack = nil
		return err
	}
	r.mu.Lock()
	if r.index != nil {
		r.index.Swept()
	}
	r.mu.Unlock()
	return nil
}

func (r *reaper) staleEntry(e conntrack.Entry) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.index == nil {
		return false
	}
	return r.index.Ended(e.Protocol, e.Original.Destination, e.Reply.Source, e.Status&conntrack.DNAT != 0, r.lives)
}

func (r *reaper) serves(protocol service.Protocol, to netip.AddrPort) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.index == nil || r.index.Serves(protocol, to)
}

// sweepSockets ends sockets.
func (r *reaper) sweepSockets(ctx context.Context) error {
	r.mu.Lock()
	translator := r.connect
	r.mu.Unlock()
	if translator == nil {
		return nil
	}
	all, err := translator.Translations()
	if err != nil {
		return err
	}
	stale := map[uint64]bool{}
	remotes := map[service.Protocol][]netip.AddrPort{}
	for _, t := range all {
		if r.staleTranslation(t) {
			stale[t.Cookie] = true
			remotes[t.Protocol] = append(remotes[t.Protocol], t.Backend)
		}
	}
	if len(stale) == 0 {
		return nil
	}
	namespaces, err := r.namespaces()
	if err != nil {
		return err
	}
	var errs []error
	ended := 0
	for _, path := range namespaces {
		n, err := endSockets(ctx, path, remotes, stale)
		ended += n
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a pod that is gone took its sockets along
			errs = append(errs, err)
		}
	}
	r.counts.ended.WithLabelValues("socket").Add(float64(ended))
	if ended > 0 {
		r.log.Info("ended sockets of removed endpoints", "number", ended)
	}
	return errors.Join(errs...)
}

func (r *reaper) staleTranslation(t connect.Translation) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.index == nil {
		return false
	}
	return r.index.Cut(t.Protocol, t.Frontend, t.Backend, r.lives)
}

// namespaces returns the paths of the network namespaces of the node and its pods.
func (r *reaper) namespaces() ([]string, error) {
	entries, err := os.ReadDir(r.paths.NetNS)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	paths := []string{link.OwnNetNS}
	for _, e := range entries {
		paths = append(paths, filepath.Join(r.paths.NetNS, e.Name()))
	}
	return paths, nil
}

func endSockets(ctx context.Context, path string, remotes map[service.Protocol][]netip.AddrPort, stale map[uint64]bool) (int, error) {
	sockets, err := conntrack.OpenSockets(path)
	if err != nil {
		return 0, err
	}
	defer sockets.Close()
	ended := 0
	for protocol, of := range remotes {
		n, err := sockets.Sweep(ctx, protocol, of, func(s conntrack.Socket) bool { return stale[s.Cookie] })
		ended += n
		if err != nil {
			return ended, err
		}
	}
	return ended, nil
}
