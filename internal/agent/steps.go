package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
)

// steps is what a pass does, in this order. docs/design/agent.md has the same table, with what each step does; why one comes
// before another is said here and nowhere else.
var steps = []step{
	// The node's own addresses come first: a connection to the API server from an address that is gone has to be closed before
	// anything waits for an answer by it.
	{name: "addresses", run: (*Agent).readAddresses},
	// Nothing is changed before the API was seen: what an agent before this one made is good until then.
	{name: "api", run: (*Agent).awaitAPI},
	{name: "configuration", run: (*Agent).readConfiguration},
	{name: "devices", run: (*Agent).readDevices},
	{name: "plan", run: (*Agent).makePlan},
	// The rules come before the settings: with them the kernel loads connection tracking, and that has settings of the plan. The
	// routes do not wait for them to be good.
	{name: "masquerade", run: (*Agent).setMasquerade},
	// The guard comes before the tunnel, which without it takes packets from anyone.
	{name: "guard", despite: true, run: (*Agent).setGuard},
	// A setting is written down before it is changed, or an uninstall could not put it back.
	{name: "settings", despite: true, run: (*Agent).recordSettings},
	{name: "routes", despite: true, run: (*Agent).setRoutes},
	// Pods come before all that a failure may end, and despite one: they have to be reached when the node's own address has
	// changed, and the plan is still of the address that it had.
	{name: "pods", despite: true, run: (*Agent).keepPods},
	// The kernel of which pods are isolated comes before the fast path, which only the others take.
	{name: "policies", run: (*Agent).keepPolicies},
	// The fast path is a shorter way for routes that are there.
	{name: "fast path", run: (*Agent).keepFastPath},
	// From here on a pass is about pods that the node gives addresses to.
	{name: "ranges", run: (*Agent).checkRanges},
	{name: "blocks", run: (*Agent).keepBlocks},
	{name: "dns cache", run: (*Agent).keepNodeCache},
	{name: "services", run: (*Agent).tellProxy},
	{name: "unserved", run: (*Agent).refuseUnserved},
	{name: "load balancers", run: (*Agent).tellBalancer},
	// The runtime learns of the network after Services are carried: a pod that it starts may ask one at once.
	{name: "services ready", run: (*Agent).awaitServices},
	// And after its policies: a pod that it starts waits for its own, and there is no answer before any is known.
	{name: "policies ready", run: (*Agent).awaitPolicies},
	{name: "conflist", run: (*Agent).announceToRuntime},
	// Routers come last: they are told of nothing that the node does not carry yet, and a speaker that comes back after a
	// restart may say that packets were forwarded all the while.
	{name: "routers", run: (*Agent).announceToRouters},
}

// step is a part of a pass.
type step struct {
	name string // the field step of the log, of metrics, and of what the agent answers
	// despite says that the step is run although one before it has failed.
	despite bool
	run     func(*Agent, context.Context, *pass) outcome
}

// outcome is what a step has to say.
type outcome struct {
	// problems are what is less than was asked for. The node carries pods.
	problems []string
	// err, if not nil, has the pass fail: the node is not ready, and no step is run any more but those that are run despite it.
	err error
	// ends says that no other step may run at all.
	ends bool
}

// pass is what the steps of one pass find out, for those that come after them.
type pass struct {
	// pods says that the node's own pods are looked at, whatever else the pass is about.
	pods bool

	local      map[netip.Addr]bool // the node's own addresses, as its kernel has them
	localErr   error
	interfaces []podnet.Interface
	facts      netfacts.Facts
	plan       podnet.Plan
	changes    podnet.Changes // of the kernel
	services   vip.Objects    // what pools of Services' addresses are made of
	pools      vip.Pools

	status   answer.Status
	problems []string
	failed   []string // names of steps
	errs     []error
}

// runSteps runs the steps of a list in order, and calls observe after each.
func runSteps(ctx context.Context, a *Agent, list []step, p *pass, observe func(step string, took time.Duration)) {
	for _, s := range list {
		if len(p.errs) > 0 && !s.despite {
			continue
		}
		began := time.Now()
		o := s.run(a, ctx, p)
		observe(s.name, time.Since(began))
		p.problems = append(p.problems, o.problems...)
		if o.err != nil {
			p.failed = append(p.failed, s.name)
			p.errs = append(p.errs, fmt.Errorf("step %q: %w", s.name, o.err))
		}
		if o.ends {
			return
		}
	}
}

// pass makes the kernel, the conflist and the Node what they should be, and says how that went. With pods it looks
// after what the node has of its own pods, too.
func (a *Agent) pass(ctx context.Context, pods bool) {
	began := time.Now()
	p := &pass{pods: pods}
	runSteps(ctx, a, steps, p, a.metrics.stepped)
	err := errors.Join(p.errs...)
	a.metrics.passed(time.Since(began), err)
	a.turned.set(time.Now())
	if err != nil {
		p.status.Ready, p.status.Reason, p.status.Failed = false, err.Error(), p.failed
		a.Log.Error("the pass failed", "steps", p.failed, "error", answer.OneLine(err))
		p.problems = append(p.problems, err.Error())
	}
	a.tellProblems(p.problems)
	if was := a.state.set(p.status); was.Ready != p.status.Ready || was.Reason != p.status.Reason {
		a.Log.Info("status", "ready", p.status.Ready, "reason", p.status.Reason)
	}
	a.publish(p.status)
}

func (a *Agent) readAddresses(_ context.Context, p *pass) outcome {
	p.local, p.localErr = a.node.LocalAddrs() // an error is for the step devices to tell: without the API nothing follows from it
	if p.pods && p.localErr == nil {
		a.cutDead(p.local)
	}
	return outcome{}
}

func (a *Agent) awaitAPI(_ context.Context, p *pass) outcome {
	if !a.view.Synced() {
		reason := "the API server has not answered yet"
		if err := a.view.Problem(); err != nil {
			reason += ": " + err.Error()
		}
		p.status = answer.Status{Waiting: true, Reason: reason}
		return outcome{ends: true}
	}
	a.proxy.SetLeaves(leaves(a.view.Node(a.Node))) // whatever becomes of the rest
	return outcome{}
}

func (a *Agent) readConfiguration(context.Context, *pass) outcome {
	config, err := netconf.Parse(a.view.Config())
	switch {
	case err == nil:
		a.config = &config
		return outcome{}
	case a.config == nil:
		return outcome{err: fmt.Errorf("ConfigMap %s/%s: %w", netconf.Namespace, netconf.ConfigMap, err), ends: true}
	}
	return outcome{problems: []string{fmt.Sprintf("ConfigMap %s/%s is not followed, the configuration before it stays in force: %v",
		netconf.Namespace, netconf.ConfigMap, answer.OneLine(err))}}
}

func (a *Agent) readDevices(_ context.Context, p *pass) outcome {
	var err error
	if p.interfaces, err = podroute.Underlay(a.node); err != nil {
		return outcome{err: fmt.Errorf("read the node's devices: %w", err), ends: true}
	}
	return outcome{err: p.localErr, ends: p.localErr != nil}
}

func (a *Agent) makePlan(_ context.Context, p *pass) outcome {
	blocks, refused := a.blocks.All()
	a.tellRefused(refused)
	p.facts = netfacts.Read(a.view.Nodes.All(), a.Node, *a.config).WithBlocks(blocks)
	plan, found := podnet.NewPlan(a.Node, p.interfaces, p.facts.Nodes, p.facts.Config)
	p.plan = plan
	var o outcome
	for _, problem := range append(p.facts.Problems, found...) {
		o.problems = append(o.problems, problem.String())
	}
	if plan.Node == "" {
		p.status.Reason = "no Node " + a.Node + " yet"
		o.ends = true
	}
	return o
}

func (a *Agent) setMasquerade(_ context.Context, p *pass) outcome {
	var err error
	p.changes.Masquerade, err = a.rules.SetMasquerade(p.plan.Masquerade)
	return outcome{err: err}
}

// setGuard sets the rules that keep pods to their own addresses. A kernel that lacks what these need (nft_fib_inet) still
// carries pods, so that it is a problem to report, not a node that is not ready.
func (a *Agent) setGuard(_ context.Context, p *pass) outcome {
	var err error
	if p.changes.Guard, err = a.rules.SetGuard(p.plan.Guard); err != nil {
		return problem(fmt.Errorf("pods can send from addresses that are not theirs: %w", err))
	}
	return outcome{}
}

func (a *Agent) recordSettings(_ context.Context, p *pass) outcome {
	if err := a.settings.remember(p.plan.Sysctls); err != nil {
		return outcome{err: fmt.Errorf("write down the node's settings: %w", err), ends: true}
	}
	return outcome{}
}

// setRoutes sets tunnel, routes, neighbours and settings: first what differs from the plan before this one, then all of it.
func (a *Agent) setRoutes(_ context.Context, p *pass) outcome {
	atOnce, err := podroute.Follow(a.node, a.held, p.plan)
	if err != nil {
		return outcome{err: err, ends: true}
	}
	a.held = podnet.Plan{}
	changes, err := podroute.Set(a.node, p.plan)
	changes.Routes.Added += atOnce.Routes.Added
	changes.Routes.Corrected += atOnce.Routes.Corrected
	changes.Masquerade, changes.Guard = p.changes.Masquerade, p.changes.Guard
	a.metrics.changed(changes)
	foreign, err := podroute.ForeignRoutes(err)
	o := outcome{err: err}
	for _, f := range foreign {
		// Packets have a way, if not ours. While a network is replaced that is as it should be.
		o.problems = append(o.problems, f.Error())
	}
	if err != nil || len(p.errs) > 0 {
		return o
	}
	if len(foreign) == 0 {
		a.held = p.plan
	}
	if changes.Total() > 0 {
		a.Log.Info("changed the kernel", "what", changes.String())
	}
	return o
}

// keepPods takes back what pods that are gone have left, and gives those that are there what the node has lost of them. What
// is in the way of that stays a problem until the next look.
func (a *Agent) keepPods(ctx context.Context, p *pass) outcome {
	own := p.facts.Own
	if sources := podSources(own, p.local); p.pods || p.plan.PodMTU != a.podMTU || !slices.Equal(sources, a.podSources) {
		a.podProblems = nil
		leases, swept := a.sweep(ctx)
		a.policies.SetLeases(policyLeases(leases))
		for _, err := range []error{swept, a.endFlows(newPodPorts(leases, slices.Concat(own.PodCIDRs, own.Blocks), p.local)), a.repairPods(leases, p.plan, sources)} {
			if err != nil {
				a.podProblems = append(a.podProblems, answer.OneLine(err))
			}
		}
		a.podMTU, a.podSources = p.plan.PodMTU, sources
	}
	return outcome{problems: a.podProblems}
}

func (a *Agent) keepFastPath(_ context.Context, p *pass) outcome {
	return problem(a.setFastPath(p.plan, p.interfaces, p.pods))
}

func (a *Agent) checkRanges(_ context.Context, p *pass) outcome {
	p.status = answer.Status{Plan: p.plan, Config: *a.config, Interfaces: p.interfaces, Addresses: nodeAddresses(p.facts.Own)}
	if len(p.facts.Own.PodCIDRs) > 0 {
		return outcome{}
	}
	p.status.Reason = fmt.Sprintf("Node %s has no podCIDRs: run kube-controller-manager with --allocate-node-cidrs and --cluster-cidr", a.Node)
	return outcome{ends: true}
}

func (a *Agent) awaitServices(_ context.Context, p *pass) outcome {
	services := a.proxy.Status()
	if !services.Ready {
		p.status.Reason = "Services: " + services.Problem
		return outcome{ends: true}
	}
	a.flows.look()
	if services.Problem != "" {
		return outcome{problems: []string{"Services: " + services.Problem}}
	}
	return outcome{}
}

func (a *Agent) announceToRuntime(_ context.Context, p *pass) outcome {
	err := a.writeConflist(p.plan, p.facts.Own)
	p.status.Ready = err == nil
	return outcome{err: err}
}

// problem is the outcome of a step after whose failure the node carries pods.
func problem(err error) outcome {
	if err == nil {
		return outcome{}
	}
	return outcome{problems: []string{answer.OneLine(err)}}
}
