// Package proxy is the Service proxy of a node. It follows the API's Services and EndpointSlices, and makes the kernel
// balance their traffic. Connections from the node's own processes and pods are balanced at connect() (kernel/bpf/connect),
// and arriving packets by nftables (kernel/ruleset). Where the kernel cannot balance at connect(), nftables balances
// everything.
//
// The proxy writes a change as soon as it receives the event: nothing waits for a tick. It writes everything at the start,
// after an error, and when a comparison finds that the kernel differs; changes continue meanwhile. docs/design/services.md.
package proxy

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/kernel/bpf/connect"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Options configures a proxy.
type Options struct {
	Client *kube.Client
	Log    *slog.Logger
	// Changed is called when the result of Status may have changed. It must not block.
	Changed func()
	Paths   Paths
	// Loopback may be nil: then 127.0.0.1 answers at NodePorts only where connect() balances.
	Loopback Loopback
	// Resync is how often the kernel is compared with the plan. Comparisons take at most a hundredth of the time: a slow
	// one makes the interval longer. Reading 100,000 endpoints back takes a second, during which changes continue.
	Resync time.Duration
	// Renew is how often everything is computed and set again, since a comparison trusts the result of earlier changes.
	// Changes wait for it. Zero means one hour.
	Renew time.Duration
}

// Loopback controls whether the node routes 127.0.0.0/8 like other addresses. Where nftables alone balances, a packet from
// the node to 127.0.0.1:nodePort is translated to an endpoint behind another device, and the reply is addressed to
// 127.0.0.1 again: without this setting the kernel drops it as martian. The setting is on only while the table exists that
// keeps other hosts from these addresses.
type Loopback interface {
	Routed() (bool, error)
	// Route turns routing on, or restores the previous setting. If nothing has to change, the call costs next to nothing.
	Route(on bool) error
}

// Paths holds the node's directories that a proxy uses.
type Paths struct {
	BPF    string // for pins, on a bpffs
	Cgroup string // where the node's cgroup file systems are mounted, such as /sys/fs/cgroup
	NetNS  string // where the runtime mounts pods' network namespaces
}

// Proxy is the Service proxy of a node.
type Proxy struct {
	Options
	kick wake.Signal

	mu     sync.Mutex
	config answer.ProxyConfig
	// externalIPs is apart from the configuration, which causes a full set when it changes: nodes come and go.
	externalIPs service.ExternalIPs
	// clusterIPs is whether LoadBalancers should include ClusterIPs, and tellsClusterIPs whether it does.
	clusterIPs, tellsClusterIPs bool
	status                      answer.ProxyStatus
	// balancers is nil while Services are unknown.
	balancers []service.LoadBalanced
	others    []netip.Addr // of Services that another proxy carries
	// What the kernel holds, for State.
	connect *connect.Translator
	missing string

	inbox  *inbox // nil while the mode is off
	kernel kernel
	reaper *reaper
	health health
	caches nodeCaches
	room   room
	dns    service.Redirect
	// redirected is where dns may lead, for the reaper.
	redirected atomic.Pointer[service.Redirect]
	// whole requests a full set, whatever the kernel holds.
	whole     bool
	wholeAt   time.Time          // of the last full set
	comparing *comparing         // nil while none is running
	applied   answer.ProxyConfig // of the last full set that succeeded
	tried     answer.ProxyConfig // of the last attempt
	counts    *metrics
}

// New returns a proxy that does nothing until Run, and writes nothing to the kernel until Set.
func New(o Options) *Proxy {
	p := &Proxy{Options: o, kick: wake.New(), counts: newMetrics()}
	p.kernel = kernel{paths: o.Paths, loopback: o.Loopback, log: o.Log}
	p.health.now = time.Now
	p.reaper = newReaper(o.Paths, o.Log, p.counts)
	p.caches = nodeCaches{log: o.Log, changed: p.kick.Set, port: service.DNSPort}
	p.dns = service.Redirect{Service: service.ClusterDNS, Port: service.DNSPort}
	p.status.Problem = "the Service proxy is starting"
	return p
}

// Set tells the proxy about its node and the configuration. It does not block.
func (p *Proxy) Set(c answer.ProxyConfig) {
	p.mu.Lock()
	same := reflect.DeepEqual(c, p.config)
	p.config = c
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// SetExternalIPs sets which external IPs of Services are served; initially none. It does not block.
func (p *Proxy) SetExternalIPs(x service.ExternalIPs) {
	p.mu.Lock()
	same := p.externalIPs.Equal(x)
	p.externalIPs = x
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// SetClusterIPs sets whether LoadBalancers includes ClusterIPs. It does not block.
func (p *Proxy) SetClusterIPs(told bool) {
	p.mu.Lock()
	same := p.clusterIPs == told
	p.clusterIPs = told
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// TellsClusterIPs reports whether the result of LoadBalancers includes ClusterIPs from now on.
func (p *Proxy) TellsClusterIPs() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tellsClusterIPs
}

// SetLeaves sets whether the node will soon be gone. The node carries Services until then, but load balancers outside,
// which use its health check, send it no new connections. SetLeaves does not block.
func (p *Proxy) SetLeaves(leaves bool) { p.health.leaves.Store(leaves) }

// Status returns the proxy's progress.
func (p *Proxy) Status() answer.ProxyStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status
}

func (p *Proxy) setStatus(s answer.ProxyStatus) {
	p.mu.Lock()
	same := p.status == s
	p.status = s
	p.mu.Unlock()
	if !same {
		p.Log.Info("Services", "ready", s.Ready, "problem", s.Problem)
		p.Changed()
	}
}

const (
	// retry is how long after an error everything is tried again.
	retry = time.Second
	renew = time.Hour
	// compareShare is the inverse of the share of time that comparisons may take.
	compareShare = 100
)

// untilCompared is the time from the end of a comparison to the start of the next.
func untilCompared(resync, took time.Duration) time.Duration { return max(resync, compareShare*took) }

// Run follows Services until the context ends. The kernel keeps what it holds.
func (p *Proxy) Run(ctx context.Context) {
	defer p.health.close()
	defer p.caches.close()
	defer p.kernel.close()
	settled := collectRarely()
	defer settled()
	defer p.stopComparing()
	defer func() {
		if p.inbox != nil {
			p.inbox.stop()
		}
	}()
	var reaping sync.WaitGroup
	reaping.Go(func() { p.reaper.run(ctx) })
	defer reaping.Wait()
	resync := time.NewTimer(p.Resync)
	defer resync.Stop()
	second := time.NewTicker(retry)
	defer second.Stop()
	for {
		tick := false
		select {
		case <-ctx.Done():
			return
		case <-p.kick:
		case <-second.C:
			tick = true
		case <-resync.C:
			if time.Since(p.wholeAt) < cmp.Or(p.Renew, renew) {
				if p.compare(ctx); p.comparing == nil {
					resync.Reset(p.Resync)
				}
				continue
			}
			p.whole = true
			resync.Reset(p.Resync)
		case c := <-p.results():
			p.conclude(c)
			resync.Reset(untilCompared(p.Resync, c.took))
		}
		comparing := p.comparing != nil
		p.step(ctx, tick)
		if p.Status().Ready {
			settled()
		}
		if comparing && p.comparing == nil {
			resync.Reset(p.Resync) // the comparison was cancelled
		}
	}
}

// step brings the kernel from what it holds to what is known now.
func (p *Proxy) step(ctx context.Context, tick bool) {
	p.mu.Lock()
	c := p.config
	p.mu.Unlock()
	switch c.Mode {
	case "":
		return // Services are not known yet
	case netconf.ProxyOff:
		p.off(ctx, c.Announce)
		return
	}
	if p.inbox == nil {
		p.inbox = follow(ctx, p.Client, p.kick.Set)
		p.whole = true
	}
	if !reflect.DeepEqual(c, p.tried) {
		p.whole = true
	}
	p.inform()
	p.caches.set(ctx, c.NodeCaches)
	if p.kernel.failed && !tick && !p.whole {
		return // not at every event: a failing attempt may be slow
	}
	if !p.inbox.synced() {
		p.setStatus(answer.ProxyStatus{Ready: p.Status().Ready, Problem: "the API server has not listed all Services yet"})
		return
	}
	if err := p.apply(c); err != nil {
		p.setStatus(answer.ProxyStatus{Ready: p.Status().Ready, Problem: answer.OneLine(err)})
		return
	}
	now := time.Now()
	if tick {
		p.health.retry(p.Log)
		if err := p.lookForRoom(now); err != nil {
			p.Log.Debug("cannot tell whether there is room for clients of Services", "error", err)
		}
	}
	p.setStatus(answer.ProxyStatus{Ready: true, Problem: p.room.problem(now)})
	p.tellBalancers()
}

// LoadBalancers returns the Services that the network outside can reach by their addresses. known is false while Services
// are not known. The kernel already holds all that it returns. The list is read-only.
func (p *Proxy) LoadBalancers() (list []service.LoadBalanced, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.balancers, p.balancers != nil
}

// Others returns the addresses of Services that another proxy carries, by the label
// service.kubernetes.io/service-proxy-name, sorted.
func (p *Proxy) Others() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.others
}

// inform gives the inbox the facts that are not in Service objects.
func (p *Proxy) inform() {
	p.mu.Lock()
	externalIPs, clusterIPs := p.externalIPs, p.clusterIPs
	p.mu.Unlock()
	p.inbox.inform(externalIPs, clusterIPs)
}

// Serves reports whether traffic to an address and port may belong to a Service. It is true also while Services are
// unknown, and for Services that another proxy carries. Any goroutine may call it.
func (p *Proxy) Serves(protocol service.Protocol, to netip.AddrPort) bool {
	return p.reaper.serves(protocol, to)
}

// tellBalancers updates the result of LoadBalancers.
func (p *Proxy) tellBalancers() {
	list, clusterIPs, listed := p.inbox.balancers()
	others, differs := p.inbox.others(), false
	p.mu.Lock()
	if !slices.Equal(others, p.others) {
		p.others, differs = others, true
	}
	if listed || p.balancers == nil {
		p.balancers = append([]service.LoadBalanced{}, list...)
		differs = true
	}
	if clusterIPs != p.tellsClusterIPs {
		p.tellsClusterIPs, differs = clusterIPs, true
	}
	p.mu.Unlock()
	if differs {
		p.Changed()
	}
}

// apply writes what has changed, or everything, to the kernel.
func (p *Proxy) apply(c answer.ProxyConfig) error {
	began := time.Now()
	plan := service.Plan{NodePortAddrs: c.NodePortAddrs, OwnPods: c.OwnPods}
	if p.whole || p.kernel.failed {
		p.stopComparing()
		heard, checks := p.inbox.whole(c.Node, &plan)
		p.redirect()
		plain := plan
		plan.Frontends = p.dns.Frontends(plan.Frontends)
		count, err := p.kernel.set(c.Mode, plan, plain, c.NodeCaches)
		p.tried, p.whole, p.kernel.failed = c, false, err != nil
		p.counts.applied("whole", heard, began, count, err)
		if err != nil {
			return fmt.Errorf("put all Services into the kernel: %w", err)
		}
		p.applied = c
		p.wholeAt = time.Now()
		p.mu.Lock()
		p.connect, p.missing = p.kernel.connect, p.kernel.missing
		p.mu.Unlock()
		p.health.set(checks, p.Log)
		p.counts.frontends.Set(float64(len(plan.Frontends)))
		p.noteRedirect(p.dns.Addrs())
		p.reaper.replace(plan, c.ServiceCIDRs, p.inbox.others(), p.kernel.connect, p.lives(p.inbox), p.inbox.departures)
		return nil
	}
	heard, plain, checks := p.inbox.changes()
	changes := append(p.dns.Changes(plain), p.redirect()...)
	if len(changes)+len(plain) > 0 {
		err := p.kernel.change(changes, plain)
		p.counts.applied("change", heard, began, len(changes), err)
		if err != nil {
			// The kernel holds something else than the proxy assumed. The full set that follows reads what it holds.
			p.Log.Warn("Services were changed by another program, or the kernel rejected a change; comparing all of them", "error", err)
			p.whole = true
			return p.apply(c)
		}
		for _, c := range changes {
			p.counts.frontends.Add(float64(len(c.New) - len(c.Old)))
		}
		p.noteRedirect(p.dns.Addrs())
		p.reaper.apply(changes)
	} else if !heard.IsZero() { // an address that no frontend uses any more may have stopped being an endpoint
		p.reaper.kick.Set()
	}
	p.health.set(checks, p.Log)
	return nil
}

// redirect makes the cluster's DNS lead to the caches that answer, and returns the changes that follow.
func (p *Proxy) redirect() []service.Change {
	before := p.dns.Addrs()
	changes := p.dns.Set(p.caches.answering())
	// Until the kernel holds the change, and a moment longer, sockets of both kinds exist.
	p.noteRedirect(slices.Concat(before, p.dns.Addrs()))
	return changes
}

// noteRedirect tells other goroutines where redirection may lead the cluster's DNS.
func (p *Proxy) noteRedirect(to []netip.Addr) {
	r := service.Redirect{Service: p.dns.Service, Port: p.dns.Port}
	r.Set(to)
	p.redirected.Store(&r)
}

// lives returns a function that reports the state of a Service's endpoint, which is one of its own or the node's DNS cache.
func (p *Proxy) lives(in *inbox) service.Lives {
	return func(name service.Name, endpoint netip.AddrPort) service.Life {
		if r := p.redirected.Load(); r != nil && r.Includes(name, endpoint) {
			return service.Life{Present: true, Serving: true}
		}
		return in.life(name, endpoint)
	}
}

// off takes everything out of the kernel, unless that is done already. It continues to follow Services if they are to be
// announced.
func (p *Proxy) off(ctx context.Context, announce bool) {
	switch {
	case announce && p.inbox == nil:
		p.inbox = follow(ctx, p.Client, p.kick.Set)
	case announce && p.inbox.synced():
		p.inform()
		p.tellBalancers()
	case !announce && p.inbox != nil:
		p.inbox.stop()
		p.inbox = nil
		p.mu.Lock()
		p.balancers, p.tellsClusterIPs = nil, false
		p.mu.Unlock()
	}
	p.stopComparing()
	p.health.close()
	p.caches.close()
	p.reaper.forget()
	p.room = room{}
	if p.applied.Mode == netconf.ProxyOff {
		return
	}
	p.mu.Lock()
	p.connect, p.missing = nil, ""
	p.mu.Unlock()
	if err := p.kernel.remove(); err != nil {
		p.setStatus(answer.ProxyStatus{Ready: true, Problem: fmt.Sprintf("take Services out of the kernel: %s", answer.OneLine(err))})
		return
	}
	p.applied = answer.ProxyConfig{Mode: netconf.ProxyOff}
	p.setStatus(answer.ProxyStatus{Ready: true})
}

// Remove takes everything that a proxy wrote out of the kernel, when Fathom is removed from a node.
func Remove(paths Paths, loopback Loopback) error {
	k := kernel{paths: paths, loopback: loopback, log: slog.New(slog.DiscardHandler)}
	defer k.close()
	return k.remove()
}

// inbox holds what the API server has sent. client-go's goroutines change its model, and the proxy's reads it.
type inbox struct {
	stop   context.CancelFunc
	synced func() bool
	wake   func()

	mu    sync.Mutex
	model *service.Model
	heard time.Time // of the first event since the model was last read
	// clusterIPs is true if the model includes ClusterIPs.
	clusterIPs bool
	// foreign holds the addresses of Services that another proxy carries.
	foreign map[service.Name][]netip.Addr
}

func follow(ctx context.Context, client *kube.Client, wake func()) *inbox {
	in := &inbox{wake: wake, model: service.NewModel(service.Node{}), foreign: map[service.Name][]netip.Addr{}}
	ctx, in.stop = context.WithCancel(ctx)
	// Headless Services are left out: they have no address to balance.
	balanced := kube.Selection{Labels: "!" + corev1.IsHeadlessService}
	services := kube.Watch(ctx, client, kube.Services, kube.Options[*corev1.Service]{Selection: balanced, Set: in.SetService, Deleted: in.DeleteService, Changed: wake})
	endpoints := kube.Watch(ctx, client, kube.EndpointSlices, kube.Options[*discoveryv1.EndpointSlice]{Selection: balanced, Set: in.SetSlice, Deleted: in.DeleteSlice, Changed: wake})
	in.synced = func() bool { return services.Synced() && endpoints.Synced() }
	return in
}

func (in *inbox) do(change func(*service.Model)) {
	in.mu.Lock()
	if in.heard.IsZero() {
		in.heard = time.Now()
	}
	change(in.model)
	in.mu.Unlock()
	in.wake()
}

// SetService is called for a Service that is new or has changed.
func (in *inbox) SetService(s *corev1.Service) {
	read := svcfacts.Service(s)
	in.do(func(m *service.Model) {
		m.SetService(read)
		delete(in.foreign, read.Name)
		if addrs := svcfacts.ForeignAddrs(s); len(addrs) > 0 {
			in.foreign[read.Name] = addrs
		}
	})
}

// DeleteService is called for a deleted Service.
func (in *inbox) DeleteService(n service.Name) {
	in.do(func(m *service.Model) {
		m.DeleteService(n)
		delete(in.foreign, n)
	})
}

// SetSlice is called for an EndpointSlice that is new or has changed.
func (in *inbox) SetSlice(s *discoveryv1.EndpointSlice) {
	read := svcfacts.Slice(s)
	in.do(func(m *service.Model) { m.SetSlice(read) })
}

// DeleteSlice is called for a deleted EndpointSlice.
func (in *inbox) DeleteSlice(n service.Name) {
	in.do(func(m *service.Model) { m.DeleteSlice(n) })
}

// whole fills the plan with all frontends. heard is when the first of its unapplied changes was received.
func (in *inbox) whole(node service.Node, plan *service.Plan) (heard time.Time, checks []service.HealthCheck) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.model.SetNode(node)
	plan.Frontends = in.model.Frontends()
	heard, in.heard = in.heard, time.Time{}
	return heard, in.model.HealthChecks()
}

func (in *inbox) changes() (heard time.Time, changes []service.Change, checks []service.HealthCheck) {
	in.mu.Lock()
	defer in.mu.Unlock()
	heard, in.heard = in.heard, time.Time{}
	return heard, in.model.Changes(), in.model.HealthChecks()
}

// balancers returns the Services that the network outside can reach by their addresses. differs reports whether they have
// changed, clusterIPs whether they include ClusterIPs.
func (in *inbox) balancers() (list []service.LoadBalanced, clusterIPs, differs bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	list, differs = in.model.LoadBalancers()
	return list, in.clusterIPs, differs
}

func (in *inbox) inform(x service.ExternalIPs, clusterIPs bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.model.SetExternalIPs(x)
	in.model.SetClusterIPs(clusterIPs)
	in.clusterIPs = clusterIPs
}

// life returns what is known of a Service's endpoint.
func (in *inbox) life(name service.Name, endpoint netip.AddrPort) service.Life {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Life(name, endpoint)
}

// departures returns how many pods that were endpoints have gone.
func (in *inbox) departures() uint64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Departures()
}

// named returns the Services with these IDs.
func (in *inbox) named(ids []uint32) []service.Name {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Named(ids)
}

// others returns the addresses of Services that another proxy carries.
func (in *inbox) others() []netip.Addr {
	in.mu.Lock()
	defer in.mu.Unlock()
	var all []netip.Addr
	for _, addrs := range in.foreign {
		all = append(all, addrs...)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}
