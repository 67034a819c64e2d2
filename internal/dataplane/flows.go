package dataplane

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/flow"
	"github.com/fathom-network/fathom/internal/lease"
	"github.com/fathom-network/fathom/internal/service"
)

// departed ends the flows of addresses that pods have given back, by DEL or by the sweep. A client that goes on sending
// keeps the entry of a host port alive for longer than an address rests, and the next pod with the address would get
// what is not its own. One walk of the kernel's table is for all that have gone meanwhile, and no pass waits for it; an
// address rests for longer than that takes.
type departed struct {
	log   *slog.Logger
	ended prometheus.Counter
	kick  chan struct{}

	mu      sync.Mutex
	pending map[netip.Addr]bool // whether nobody has the address
	// done are the releases that were heard of.
	done map[lease.Released]bool
}

func newDeparted(log *slog.Logger, ended prometheus.Counter) *departed {
	return &departed{log: log, ended: ended, kick: make(chan struct{}, 1), pending: map[netip.Addr]bool{}, done: map[lease.Released]bool{}}
}

// set tells of all addresses that rest, and which are in use: a pod that asks for its address of before may have it again.
// What was told before is not done again.
func (d *departed) set(released []lease.Released, inUse map[netip.Addr]bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	there := make(map[lease.Released]bool, len(released))
	for _, r := range released {
		there[r] = true
		if !d.done[r] {
			d.pending[r.Addr] = !inUse[r.Addr]
		}
	}
	d.done = there
	if len(d.pending) > 0 {
		select {
		case d.kick <- struct{}{}:
		default:
		}
	}
}

// departedAgain is how long to wait after an attempt that failed.
const departedAgain = time.Second

// run ends flows until the context does.
func (d *departed) run(ctx context.Context, netns string) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.kick:
		}
		d.mu.Lock()
		addrs := d.pending
		d.pending = map[netip.Addr]bool{}
		d.mu.Unlock()
		n, err := endFlows(ctx, netns, addrs)
		d.ended.Add(float64(n))
		if n > 0 {
			d.log.Info("ended flows of pods that are gone", "number", n)
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		d.log.Warn("flows of pods that are gone are not ended", "error", err)
		d.mu.Lock()
		for a, free := range addrs {
			if _, newer := d.pending[a]; !newer {
				d.pending[a] = free
			}
		}
		d.mu.Unlock()
		time.AfterFunc(departedAgain, func() {
			select {
			case d.kick <- struct{}{}:
			default:
			}
		})
	}
}

// endFlows ends what connection tracking has of the addresses.
func endFlows(ctx context.Context, netns string, addrs map[netip.Addr]bool) (int, error) {
	conntrack, err := flow.OpenConntrack(netns)
	if err != nil {
		return 0, err
	}
	defer conntrack.Close()
	return conntrack.Sweep(ctx, []service.Protocol{service.TCP, service.UDP, service.SCTP}, func(e flow.Entry) bool { return hasDeparted(e, addrs) })
}

// hasDeparted says whether a flow is of one of the addresses, of which it is known whether they are free. Of one that a pod
// has again TCP is left alone: the pod has connections of its own there, and resets those of the pod before it.
func hasDeparted(e flow.Entry, addrs map[netip.Addr]bool) bool {
	for _, end := range []netip.AddrPort{e.Original.Source, e.Original.Destination, e.Reply.Source, e.Reply.Destination} {
		if free, gone := addrs[end.Addr()]; gone && (free || e.Protocol != service.TCP) {
			return true
		}
	}
	return false
}
