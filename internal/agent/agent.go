// Package agent is the agent of a node: it makes the kernel hold what the API says of the pod network, and
// tells the container runtime when the node is ready to carry pods.
//
// Its heart is one loop. Whatever happens, be it a changed object, a changed device or a tick of the clock, leads
// to the same pass from the whole of what is known to the whole of what should be; docs/design/agent.md.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/agent/announcing"
	"github.com/fathom-network/fathom/internal/agent/blocks"
	"github.com/fathom-network/fathom/internal/agent/policies"
	"github.com/fathom-network/fathom/internal/agent/proxy"
	"github.com/fathom-network/fathom/internal/cni"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bootclock"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/serve"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Options configure an agent.
type Options struct {
	Node   string
	Client *kube.Client
	Log    *slog.Logger
	Paths  Paths
	// Health and Metrics are addresses to listen on, HOST:PORT; empty for none.
	Health, Metrics string
	// MetricsAccess says who may read Metrics.
	MetricsAccess serve.Access
	// Resync is how often everything is compared without an event to ask for it.
	Resync time.Duration
	// FastPath, if set, overrides the configuration: FastPathAuto or FastPathOff.
	FastPath string
	// PolicyEstablished, if set, overrides the configuration.
	PolicyEstablished netconf.PolicyEstablished
}

// Paths are where an agent finds the node's directories, which in a pod are mounts.
type Paths struct {
	Plugin string // the plugin's program, to put into CNIBin; empty leaves CNIBin alone
	CNIBin string
	// Conflist is the file by which the runtime learns of the network.
	Conflist string
	Leases   string // as the plugin calls it too
	Socket   string // as the plugin calls it too
	NetNS    string // where the runtime mounts pods' network namespaces
	Sysctl   string // /proc/sys/net, or where it can be written
	BPF      string // where the fast path and Services are pinned, on a bpffs; as the plugin looks for it too
	Cgroup   string // where the node's cgroup file systems are mounted
}

// NodePaths are the paths on a node itself.
func NodePaths() Paths {
	return Paths{
		CNIBin: "/opt/cni/bin", Conflist: conflist.Path, Leases: conflist.DefaultDataDir,
		Socket: "/run/fathom/agent.sock", NetNS: "/run/netns", Sysctl: "/proc/sys/net", BPF: pin.Dir, Cgroup: "/sys/fs/cgroup",
	}
}

// Agent runs the network of one node.
type Agent struct {
	Options
	view     *kube.View
	node     *link.Namespace
	settings *settings
	rules    *ruleset.Ruleset
	leases   *lease.Store
	fast     fastPath
	metrics  *metrics
	bgp      *announcing.BGP
	proxy    *proxy.Proxy
	policies *policies.Keeper
	lb       *announcing.Balancer
	wake     wake.Signal
	look     wake.Signal // as wake, for the node's pods
	state    statusBox
	blocks   *blocks.Blocks
	keeper   *blocks.Keeper
	flows    *podFlows
	events   *kube.Recorder
	writes   *kube.Publisher
	turned   turning // by the loop

	// What follows belongs to the loop.
	config   *netconf.Config // the last one that made sense
	problems []string        // as last reported
	held     podnet.Plan     // what the kernel holds since the last pass, or the zero value if that is not certain
	// Results of the last look at the node's own pods.
	podMTU      int
	podSources  []netip.Addr
	podProblems []string
	// refusesNothing says that the kernel was told to refuse nothing of Services.
	refusesNothing bool
	told           published
	untold         atomic.Bool // that the event that the node carries pods is still to be sent
	// poolsDiffer says since when the status of a pool has been out of date.
	poolsDiffer map[string]time.Time
	refused     []string                               // unused blocks, as last logged
	rebuilt     map[lease.Attachment]bootclock.Instant // when each lease that was reported as rebuilt was rebuilt
}

// Run runs the node's network until the context ends. What is in the kernel stays: traffic does not notice an agent that ends or
// starts.
func Run(ctx context.Context, o Options) error {
	a := &Agent{Options: o, wake: wake.New(), look: wake.New(), metrics: newMetrics(o.Node), poolsDiffer: map[string]time.Time{}, rebuilt: map[lease.Attachment]bootclock.Instant{}}
	a.events = o.Client.NewRecorder(ctx, kube.Reporter{Component: Component, Instance: o.Node})
	a.writes = kube.NewPublisher(o.Log, a.Wake)
	a.blocks = blocks.New(o.Node, blocks.Server{Client: o.Client}, a.poolObjects, o.Log)
	a.keeper = blocks.NewKeeper(a.blocks, o.Paths.Leases, a.Wake)
	a.state.set(answer.Status{Waiting: true, Reason: "the agent is starting"})
	a.turned.patience = passPatience(o.Resync)
	a.turned.set(time.Now())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var err error
	if a.node, err = link.Here(); err != nil {
		return err
	}
	defer a.node.Close()
	a.node.SysctlsAt(o.Paths.Sysctl)
	a.settings = newSettings(a.node, o.Paths.Leases, a.damaged)
	a.proxy = a.newProxy()
	a.policies = a.newPolicies()
	a.flows = newPodFlows(o.Log, a.metrics.ended, a.proxy.Serves)
	a.lb = a.newBalancer()
	if a.rules, err = ruleset.Open(link.OwnNetNS); err != nil {
		return err
	}
	defer a.rules.Close()
	a.bgp = a.newBGP()
	defer a.bgp.Close()
	defer a.fast.close()
	a.metrics.registry.MustRegister(prometheus.WrapCollectorWith(prometheus.Labels{"node": o.Node}, &a.fast))
	a.metrics.registry.MustRegister(prometheus.WrapCollectorWith(prometheus.Labels{"node": o.Node}, poolCollector{a.readPools}))
	if a.leases, err = lease.Open(o.Paths.Leases, conflist.DefaultCoolDown); err != nil {
		return err
	}
	// The leases of running pods are rebuilt first: the repair would take what is left of them for leftovers of deleted pods.
	rebuilt, err := cni.Rebuild(a.node, a.leases, a.network())
	a.tellRebuiltLeases(rebuilt)
	if err != nil {
		return fmt.Errorf("rebuild the leases in %s: %w", o.Paths.Leases, err)
	}
	damaged, err := a.leases.Repair()
	if err != nil {
		return fmt.Errorf("repair the leases in %s: %w", o.Paths.Leases, err)
	}
	a.tellDamagedLeases(damaged)
	if o.Paths.Plugin != "" {
		if err := installProgram(o.Paths.Plugin, o.Paths.CNIBin); err != nil {
			return err
		}
	}
	stop, err := a.serve(ctx)
	if err != nil {
		return err
	}
	defer stop()
	a.view = o.Client.View(ctx, o.Node, a.Wake)
	changed, err := a.node.WatchChanges(ctx)
	if err != nil {
		return err
	}
	var carrying sync.WaitGroup
	carrying.Go(func() { a.proxy.Run(ctx) })
	carrying.Go(func() { a.policies.Run(ctx) })
	carrying.Go(func() { a.lb.Run(ctx) })
	carrying.Go(func() { a.keeper.Run(ctx) })
	carrying.Go(func() { a.flows.run(ctx, link.OwnNetNS) })
	carrying.Go(func() { a.writes.Run(ctx) })
	defer carrying.Wait()
	defer cancel() // also of an agent that ends by itself
	tick := time.NewTicker(o.Resync)
	defer tick.Stop()
	var settled <-chan time.Time
	for {
		pods := true
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
			pods = false // the node's own pods have events of their own, and a look at them takes ten times as long
		case _, open := <-changed:
			if !open && ctx.Err() == nil {
				return errors.New("the netlink subscription was closed by the kernel") // the kubelet restarts the pod
			}
			a.held = podnet.Plan{} // the change may be to something that the plan made
			if settled == nil {
				settled = time.After(settling)
			}
			continue
		case <-settled:
			settled = nil
		case <-a.look:
		case <-tick.C:
		}
		if pods {
			if err := a.openLeases(); err != nil {
				return err // the kubelet restarts the pod, with the directory that is there now
			}
		}
		a.pass(ctx, pods)
	}
}

// cutDead closes connections to the API server from addresses that the node no longer has: no answer reaches them, and the
// watches would notice a minute later.
func (a *Agent) cutDead(local map[netip.Addr]bool) {
	if n := a.Client.CutFrom(func(from netip.Addr) bool { return !from.IsLoopback() && !local[from] }); n > 0 {
		a.Log.Info("cut connections to the API server from an address that is gone", "number", n)
	}
}

// settling is how long a change of the kernel waits for others. Events arrive in bursts, mostly of the plugin's or the agent's own
// making; only the state after the last one matters.
const settling = 50 * time.Millisecond

// Wake requests a pass without waiting for it. Requests before the pass begins are one.
func (a *Agent) Wake() { a.wake.Set() }

// lookIn requests a look at the node's pods after d, when what is too young to be judged is old enough. Many requests cost no
// more than their timers: those that fire together are one look.
func (a *Agent) lookIn(d time.Duration) { time.AfterFunc(d, a.look.Set) }

// tellProblems sends an event for each new problem, and logs each that is solved.
func (a *Agent) tellProblems(problems []string) {
	slices.Sort(problems)
	problems = slices.Compact(problems)
	for _, p := range problems {
		if slices.Contains(a.problems, p) {
			continue
		}
		a.Log.Warn("problem", "what", p)
		a.event(true, "NetworkProblem", p)
	}
	for _, p := range a.problems {
		if !slices.Contains(problems, p) {
			a.Log.Info("solved", "what", p)
		}
	}
	a.problems = problems
	a.metrics.problems.Set(float64(len(problems)))
}

// damaged reports a file of the node that could not be read and was replaced.
func (a *Agent) damaged(err error) {
	a.Log.Error("a file was damaged", "error", err)
	a.event(true, "StateDamaged", err.Error())
}

func (a *Agent) tellDamagedLeases(names []string) {
	if len(names) > 0 {
		a.damaged(fmt.Errorf("%d leases in %s could not be read and were taken back, their addresses rest: %s", len(names), a.Paths.Leases, strings.Join(names, ", ")))
	}
}

// rebuiltNews is the age up to which a rebuilt lease is still reported: the plugin rebuilds leases as well, possibly while no
// agent ran.
const rebuiltNews = 10 * time.Minute

// tellRebuiltLeases reports each rebuilt lease once.
func (a *Agent) tellRebuiltLeases(leases []lease.Lease) {
	var names []string
	for _, l := range leases {
		if made, told := a.rebuilt[l.Attachment]; told && l.Rebuilt && made == l.Made {
			continue
		}
		a.rebuilt[l.Attachment] = l.Made
		names = append(names, fmt.Sprintf("%s/%s %v", l.PodNamespace, l.PodName, l.Addresses))
	}
	if len(names) == 0 {
		return
	}
	a.metrics.rebuilt.Add(float64(len(names)))
	message := fmt.Sprintf("%d leases in %s were lost, and are made again of the devices of their pods, which keep their addresses: %s. "+
		"Nobody but Fathom should change that directory", len(names), a.Paths.Leases, strings.Join(names, ", "))
	a.Log.Error("leases were lost", "what", message)
	a.event(true, "LeasesRebuilt", message)
}

func (a *Agent) event(warning bool, reason, message string) {
	a.events.Record(kube.Event{Object: kube.NodeReference(a.Node), Warning: warning, Reason: reason, Message: message})
}

const (
	// Component is the agent's name in events.
	Component = "fathom-agent"
	// apiPatience bounds a question to an API server that does not answer. No pass waits for one.
	apiPatience = 2 * time.Second
)

// nodeAddresses returns the addresses by which pods know their node: the first of each family.
func nodeAddresses(n podnet.Node) []netip.Addr {
	var list []netip.Addr
	for _, a := range n.Addrs {
		if !slices.ContainsFunc(list, func(b netip.Addr) bool { return a.Is4() == b.Is4() }) {
			list = append(list, a)
		}
	}
	return list
}
