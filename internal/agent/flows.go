package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/wake"
)

// podFlows ends flows that lead to a pod and were not meant for it. A client that goes on sending keeps the entry of a host
// port alive for longer than an address rests, and the next pod with the address would get what is not its own.
//
// There are two rules for one walk of the kernel's table. What is of an address that was given back, by DEL or by the sweep,
// ends: one walk is for all that have gone meanwhile, no pass waits for it, and an address rests for longer than that
// takes. And what went to a host port is to lead to a pod that has the port, which holds for those that have gone while
// no agent ran as well.
type podFlows struct {
	log   *slog.Logger
	ended prometheus.Counter
	// serves says whether an address and port may be a Service's, whose flows are the proxy's.
	serves func(service.Protocol, netip.AddrPort) bool
	kick   wake.Signal

	mu      sync.Mutex
	pending map[netip.Addr]bool // whether nobody has the address
	// done are the releases that were heard of.
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

// set tells of all addresses that rest, and which are in use: a pod that asks for its address of before may have it again.
// What was told before is not done again. pods are those that there are now.
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

// look has all flows looked at, once: what Services are is known, and what an agent before this one missed shows. After that
// there is nothing to find but after a pod has gone.
func (f *podFlows) look() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.looked {
		f.looked = true
		f.kick.Set()
	}
}

// flowsAgain is how long to wait after an attempt that failed.
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

// endFlows ends what connection tracking has that is to end.
func endFlows(ctx context.Context, netns string, ends func(conntrack.Entry) bool) (int, error) {
	table, err := conntrack.OpenTable(netns)
	if err != nil {
		return 0, err
	}
	defer table.Close()
	return table.Sweep(ctx, []service.Protocol{service.TCP, service.UDP, service.SCTP}, ends)
}

// hasDeparted says whether a flow is of one of the addresses, of which it is known whether they are free. Of one that a pod
// has again TCP is left alone: the pod has connections of its own there, and resets those of the pod before it.
func hasDeparted(e conntrack.Entry, addrs map[netip.Addr]bool) bool {
	for _, end := range []netip.AddrPort{e.Original.Source, e.Original.Destination, e.Reply.Source, e.Reply.Destination} {
		if free, gone := addrs[end.Addr()]; gone && (free || e.Protocol != service.TCP) {
			return true
		}
	}
	return false
}

// isLeftOver says whether a flow was sent to a port of the node and leads to a pod that has no such port, or to an address of
// pods that nobody has. One too many costs nothing: rules that are there lead the next packet the same way. That is true of UDP
// alone; a pod resets what it knows nothing of by TCP, and aborts by SCTP.
func (p podPorts) isLeftOver(e conntrack.Entry, serves func(service.Protocol, netip.AddrPort) bool) bool {
	to, pod := e.Original.Destination, e.Reply.Source
	if e.Protocol != service.UDP || e.Status&conntrack.DNAT == 0 || !p.node[to.Addr()] && !to.Addr().IsLoopback() {
		return false
	}
	l, leased := p.leases[pod.Addr()]
	if !leased {
		return slices.ContainsFunc(p.ranges, func(r netip.Prefix) bool { return r.Contains(pod.Addr()) })
	}
	return l.HostPorts != nil && !serves(e.Protocol, to) && !slices.ContainsFunc(l.HostPorts, func(h lease.HostPort) bool {
		return h.Protocol == "udp" && h.Port == to.Port() && h.Container == pod.Port() && (!h.Addr.IsValid() || h.Addr.IsUnspecified() || h.Addr == to.Addr())
	})
}
