// Package proxy is the Service proxy of a node: it follows the API's Services and EndpointSlices, and makes the kernel
// balance what is for them. What starts on the node is balanced when it connects (package bpf), what arrives by
// nftables (package ruleset); where the kernel cannot do the first, all of it by nftables.
//
// A change is in the kernel as soon as it is heard of: nothing waits for a tick. Everything is set at the beginning, after
// an error, and when a comparison finds that the kernel holds something else: these go on beside changes.
// docs/design/services.md.
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

// Options are what a proxy is told when it is made.
type Options struct {
	Client *kube.Client
	Log    *slog.Logger
	// Changed is called when Status may say something else. It must not block.
	Changed func()
	Paths   Paths
	// Loopback may be nil: then 127.0.0.1 answers at NodePorts only where connect() balances.
	Loopback Loopback
	// Resync is how often the kernel is compared, unless that takes long: then it is done in one hundredth of the time. To
	// read 100,000 endpoints back takes a second, in which changes go on.
	Resync time.Duration
	// Renew is how often everything is worked out anew and set: comparisons trust what changes have come to. Changes wait
	// for it. Zero is an hour.
	Renew time.Duration
}

// Loopback is whether the node routes 127.0.0.0/8 as it does other addresses. Where nftables alone balances, what the node
// sends to 127.0.0.1:nodePort is translated to an endpoint on another device, and what comes back is to 127.0.0.1 again:
// without that the kernel takes it for a fault. It is on only while the table is there that keeps others from these
// addresses.
type Loopback interface {
	Routed() (bool, error)
	// Route has them routed, or as it was before. Where it is so already, it costs next to nothing.
	Route(on bool) error
}

// Paths are where a proxy finds the node's directories.
type Paths struct {
	BPF    string // of pins, on a bpffs
	Cgroup string // where the node has its cgroup file systems, such as /sys/fs/cgroup
	NetNS  string // where the runtime mounts pods' network namespaces
}

// Proxy is the Service proxy of a node.
type Proxy struct {
	Options
	kick wake.Signal

	mu     sync.Mutex
	config answer.ProxyConfig
	// externalIPs is not part of the configuration, for which everything is set anew: nodes come and go.
	externalIPs service.ExternalIPs
	// Whether LoadBalancers is to tell of ClusterIPs, and whether it does.
	clusterIPs, tellsClusterIPs bool
	status                      answer.ProxyStatus
	// balancers are nil while nothing is known.
	balancers []service.LoadBalanced
	others    []netip.Addr // of Services that another proxy carries
	// As the kernel has them, for State.
	connect *connect.Translator
	missing string

	inbox  *inbox // nil while the mode is off
	kernel kernel
	reaper *reaper
	health health
	caches nodeCaches
	room   room
	dns    service.Redirect
	// redirected is where dns leads to, for the reaper.
	redirected atomic.Pointer[service.Redirect]
	// whole asks for everything to be set, whatever the kernel holds.
	whole     bool
	wholeAt   time.Time          // the last time
	comparing *comparing         // nil while none goes on
	applied   answer.ProxyConfig // what the kernel was last set by
	tried     answer.ProxyConfig // or was attempted to be
	counts    *metrics
}

// New makes a proxy, which does nothing until Run, and nothing to the kernel until Set.
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

// Set tells what the node is and what the configuration says. It does not wait.
func (p *Proxy) Set(c answer.ProxyConfig) {
	p.mu.Lock()
	same := reflect.DeepEqual(c, p.config)
	p.config = c
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// SetExternalIPs says which external IPs of Services are served; before it was called, none is. It does not wait.
func (p *Proxy) SetExternalIPs(x service.ExternalIPs) {
	p.mu.Lock()
	same := p.externalIPs.Equal(x)
	p.externalIPs = x
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// SetClusterIPs says whether LoadBalancers tells of ClusterIPs. It does not wait.
func (p *Proxy) SetClusterIPs(told bool) {
	p.mu.Lock()
	same := p.clusterIPs == told
	p.clusterIPs = told
	p.mu.Unlock()
	if !same {
		p.kick.Set()
	}
}

// TellsClusterIPs says whether what LoadBalancers tells from now on has ClusterIPs.
func (p *Proxy) TellsClusterIPs() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.tellsClusterIPs
}

// SetLeaves says whether the node will soon not be there. It carries Services until then, and load balancers outside, which
// ask at its health check, send it no new connections. It does not wait.
func (p *Proxy) SetLeaves(leaves bool) { p.health.leaves.Store(leaves) }

// Status returns how far the proxy is.
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
	// retry is how long after an error the whole is tried again.
	retry = time.Second
	renew = time.Hour
	// compareShare is how much of the time, as its inverse, comparisons may take.
	compareShare = 100
)

// untilCompared is how long after a comparison the next one begins.
func untilCompared(resync, took time.Duration) time.Duration { return max(resync, compareShare*took) }

// Run follows Services until the context ends. What is in the kernel stays.
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
			resync.Reset(p.Resync) // it was ended
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
		return // nothing is known yet
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
		return // not at each event: what failed may be slow to fail
	}
	if !p.inbox.synced() {
		p.setStatus(answer.ProxyStatus{Ready: p.Status().Ready, Problem: "the API server has not told of all Services yet"})
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
			p.Log.Debug("it is not known whether there is room for clients of Services", "error", err)
		}
	}
	p.setStatus(answer.ProxyStatus{Ready: true, Problem: p.room.problem(now)})
	p.tellBalancers()
}

// LoadBalancers returns the Services with addresses that the network outside is led to, and whether they are known. What it tells is in
// the kernel. The list is for reading.
func (p *Proxy) LoadBalancers() (list []service.LoadBalanced, known bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.balancers, p.balancers != nil
}

// Others are the addresses of Services that another proxy carries, by the label service.kubernetes.io/service-proxy-name; sorted.
func (p *Proxy) Others() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.others
}

// inform has the inbox know what is not in the API server's Services.
func (p *Proxy) inform() {
	p.mu.Lock()
	externalIPs, clusterIPs := p.externalIPs, p.clusterIPs
	p.mu.Unlock()
	p.inbox.inform(externalIPs, clusterIPs)
}

// Serves says whether what is sent to an address and port may be a Service's: also while Services are not known, or if
// another proxy carries them. It may be called by any goroutine.
func (p *Proxy) Serves(protocol service.Protocol, to netip.AddrPort) bool {
	return p.reaper.serves(protocol, to)
}

// tellBalancers has LoadBalancers return what is known now.
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

// apply puts what has changed, or everything, into the kernel.
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
			// The kernel holds something else than was thought. What it holds is read on the way to what it should.
			p.Log.Warn("Services changed beside us, or the kernel refuses a change: all of them are compared", "error", err)
			p.whole = true
			return p.apply(c)
		}
		for _, c := range changes {
			p.counts.frontends.Add(float64(len(c.New) - len(c.Old)))
		}
		p.noteRedirect(p.dns.Addrs())
		p.reaper.apply(changes)
	} else if !heard.IsZero() { // what no frontend leads to any more may be no endpoint at all now
		p.reaper.kick.Set()
	}
	p.health.set(checks, p.Log)
	return nil
}

// redirect has the cluster's DNS go to the caches that answer, and returns what that changes.
func (p *Proxy) redirect() []service.Change {
	before := p.dns.Addrs()
	changes := p.dns.Set(p.caches.answering())
	// Until the kernel has it, and a moment longer, there are sockets of both kinds.
	p.noteRedirect(slices.Concat(before, p.dns.Addrs()))
	return changes
}

// noteRedirect tells other goroutines where the cluster's DNS may lead by redirection.
func (p *Proxy) noteRedirect(to []netip.Addr) {
	r := service.Redirect{Service: p.dns.Service, Port: p.dns.Port}
	r.Set(to)
	p.redirected.Store(&r)
}

// lives says what is known of an endpoint of a Service, be it one of its own or the node's DNS cache.
func (p *Proxy) lives(in *inbox) service.Lives {
	return func(name service.Name, endpoint netip.AddrPort) service.Life {
		if r := p.redirected.Load(); r != nil && r.Includes(name, endpoint) {
			return service.Life{Present: true, Serving: true}
		}
		return in.life(name, endpoint)
	}
}

// off takes everything out of the kernel, if that was not done already. It goes on to follow Services if they are to be
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

// Remove takes what a proxy has put into the kernel out of it, for a node that Fathom leaves.
func Remove(paths Paths, loopback Loopback) error {
	k := kernel{paths: paths, loopback: loopback, log: slog.New(slog.DiscardHandler)}
	defer k.close()
	return k.remove()
}

// inbox is what the API server has told. Its model is changed by client-go's goroutines and read by the proxy's.
type inbox struct {
	stop   context.CancelFunc
	synced func() bool
	wake   func()

	mu    sync.Mutex
	model *service.Model
	heard time.Time // of the first event since the model was last asked
	// clusterIPs says that the model tells of ClusterIPs.
	clusterIPs bool
	// foreign are the addresses of Services that another proxy carries.
	foreign map[service.Name][]netip.Addr
}

func follow(ctx context.Context, client *kube.Client, wake func()) *inbox {
	in := &inbox{wake: wake, model: service.NewModel(service.Node{}), foreign: map[service.Name][]netip.Addr{}}
	ctx, in.stop = context.WithCancel(ctx)
	// A headless Service has no address, and nothing is balanced.
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

// SetService is told of a Service that is new or has changed.
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

// DeleteService is told of a Service that is gone.
func (in *inbox) DeleteService(n service.Name) {
	in.do(func(m *service.Model) {
		m.DeleteService(n)
		delete(in.foreign, n)
	})
}

// SetSlice is told of an EndpointSlice that is new or has changed.
func (in *inbox) SetSlice(s *discoveryv1.EndpointSlice) {
	read := svcfacts.Slice(s)
	in.do(func(m *service.Model) { m.SetSlice(read) })
}

// DeleteSlice is told of an EndpointSlice that is gone.
func (in *inbox) DeleteSlice(n service.Name) {
	in.do(func(m *service.Model) { m.DeleteSlice(n) })
}

// whole fills the plan with all frontends, and says when the first of what is new in it was heard of.
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

// balancers returns the Services with addresses that the network outside is led to, if they have changed, and whether
// ClusterIPs are among these.
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

// life says what is known of an endpoint of a Service.
func (in *inbox) life(name service.Name, endpoint netip.AddrPort) service.Life {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Life(name, endpoint)
}

// departures is how many pods have gone that were endpoints.
func (in *inbox) departures() uint64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Departures()
}

// named are the Services that have these IDs.
func (in *inbox) named(ids []uint32) []service.Name {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.model.Named(ids)
}

// others are the addresses of Services that another proxy carries.
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
