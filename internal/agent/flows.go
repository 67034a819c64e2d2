package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/wake"
)

// podFlows ends stale flows that lead to a pod's address. A client that keeps sending keeps the conntrack entry of a host port alive
// for longer than the address cools down, and the next pod with the address would get another pod's packets.
//
// One walk of the kernel's table applies two rules. A flow of a released address, by DEL or by the sweep, ends: one walk
// serves all addresses released meanwhile, no pass waits for it, and an address cools down for longer than a walk takes. A flow that
// was sent to a host port must lead to a pod that has this port, which also finds what an absent agent missed.
type podFlows struct {
	log   *slog.Logger
	ended prometheus.Counter
	// serves reports whether an address and port may be a Service's; the flows of Services belong to the proxy.
	serves func(service.Protocol, netip.AddrPort) bool
	kick   wake.Signal

	mu      sync.Mutex
	pending map[netip.Addr]bool // value: no pod has the address
	// done holds the releases already seen.
	done   map[lease.Released]bool
	pods   podPorts
	looked bool
}

// podPorts are the node's pods, as far as host ports are concerned.
type podPorts struct {
	leases map[netip.Addr]lease.Lease
	ranges []netip.Prefix      // in which all addresses of the node's pods are
	node   map[netip.Addr]bool // the node's own addresses
}

func newPodPorts(leases []lease.Lease, ranges []netip.Prefix, node map[netip.Addr]bool) podPorts {
	p := podPorts{leases: map[netip.Addr]lease.Lease{}, ranges: ranges, node: node}
	for _, l := range leases {
		for _, a := range l.Addresses {
			p.leases[a] = l
		}
	}
	return p
}

func newPodFlows(log *slog.Logger, ended prometheus.Counter, serves func(service.Protocol, netip.AddrPort) bool) *podFlows {
	return &podFlows{log: log, ended: ended, serves: serves, kick: wake.New(), pending: map[netip.Addr]bool{}, done: map[lease.Released]bool{}}
}

// set passes all addresses that cool down, those in use (a pod may ask for its former address again), and the present pods. A
// release that was passed before is not handled again.
func (f *podFlows) set(released []lease.Released, inUse map[netip.Addr]bool, p podPorts) {
	f.mu.Lock()
	defer f.mu.Unlock()
	there := make(map[lease.Released]bool, len(released))
	for _, r := range released {
		there[r] = true
		if !f.done[r] {
			f.pending[r.Addr] = !inUse[r.Addr]
		}
	}
	f.done, f.pods = there, p
	if len(f.pending) > 0 {
		f.kick.Set()
	}
}

// look requests the first walk, once Services are known: it finds what an agent before this one missed. After it, walks are only
// needed when a pod has gone.
func (f *podFlows) look() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.looked {
		f.looked = true
		f.kick.Set()
	}
}

// flowsAgain is the wait after a failed attempt.
const flowsAgain = time.Second

// run ends flows until the context does.
func (f *podFlows) run(ctx context.Context, netns string) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.kick:
		}
		f.mu.Lock()
		addrs, p := f.pending, f.pods
		f.pending = map[netip.Addr]bool{}
		f.mu.Unlock()
		n, err := endFlows(ctx, netns, func(e conntrack.Entry) bool { return hasDeparted(e, addrs) || p.isLeftOver(e, f.serves) })
		f.ended.Add(float64(n))
		if n > 0 {
			f.log.Info("ended flows of pods that are gone", "number", n)
		}
		if err == nil || ctx.Err() != nil {
			continue
		}
		f.log.Warn("flows of pods that are gone are not ended", "error", err)
		f.mu.Lock()
		for a, free := range addrs {
			if _, newer := f.pending[a]; !newer {
				f.pending[a] = free
			}
		}
		f.mu.Unlock()
		time.AfterFunc(flowsAgain, f.kick.Set)
	}
}

// endFlows deletes the entries of connection tracking for which ends returns true, and returns their number.
func endFlows(ctx context.Context, netns string, ends func(conntrack.Entry) bool) (int, error) {
	table, err := conntrack.OpenTable(netns)
	if err != nil {
		return 0, err
	}
	defer table.Close()
	return table.Sweep(ctx, []service.Protocol{service.TCP, service.UDP, service.SCTP}, ends)
}

// hasDeparted reports whether a flow belongs to a released address; the value says whether the address is free. TCP flows of an
// address that a pod has again are left alone: they may be the pod's own, and it resets those of the pod before it.
func hasDeparted(e conntrack.Entry, addrs map[netip.Addr]bool) bool {
	for _, end := range []netip.AddrPort{e.Original.Source, e.Original.Destination, e.Reply.Source, e.Reply.Destination} {
		if free, gone := addrs[end.Addr()]; gone && (free || e.Protocol != service.TCP) {
			return true
		}
	}
	return false
}

// isLeftOver reports whether a flow was sent to a port of the node and leads to a pod without this port, or to an address that no
// pod has. Ending one too many costs nothing: the rules lead the next packet the same way. This holds for UDP alone; a pod
// answers unknown TCP segments with RST and SCTP packets with ABORT.
func (p podPorts) isLeftOver(e conntrack.Entry, serves func(service.Protocol, netip.AddrPort) bool) bool {
	to, pod := e.Original.Destination, e.Reply.Source
	if e.Protocol != service.UDP || e.Status&conntrack.DNAT == 0 || !p.node[to.Addr()] && !to.Addr().IsLoopback() {
		return false
	}
	l, leased := p.leases[pod.Addr()]
	if !leased {
		return inet.Contains(p.ranges, pod.Addr())
	}
	return l.HostPorts != nil && !serves(e.Protocol, to) && !slices.ContainsFunc(l.HostPorts, func(h lease.HostPort) bool {
		return h.Protocol == "udp" && h.Port == to.Port() && h.Container == pod.Port() && (!h.Addr.IsValid() || h.Addr.IsUnspecified() || h.Addr == to.Addr())
	})
}
