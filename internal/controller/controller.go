// Package controller is a cluster's controller. It assigns addresses of AddressPools to Services of type LoadBalancer,
// reports how full the pools are and what of policies cannot be applied, protects IPPools that still have blocks, and removes
// sessions of deleted nodes from the status of BGPPeers. Each node decides itself for which addresses it answers; package agent.
//
// Like an agent it has one loop, from everything that is known to everything that should be: docs/design/load-balancer.md.
package controller

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/keyset"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/serve"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Component is the controller's name: in events, as the owner of what it writes, and of its Lease.
const Component = vip.Owner

// Options configures a controller.
type Options struct {
	Client *kube.Client
	Log    *slog.Logger
	// Identity is the process's name in the leader election.
	Identity string
	// Resync is how often everything is compared without an event.
	Resync time.Duration
	// Health and Metrics are HOST:PORT to listen on for probes and for Prometheus; nothing listens if empty.
	Health, Metrics string
	// MetricsAccess says who may read Metrics.
	MetricsAccess serve.Access
}

// Run waits until it leads, and then assigns addresses until the context ends. An error means that it no longer leads, or
// that it could not take part in the election.
func Run(ctx context.Context, o Options) error {
	m := newMonitor(o.Resync)
	stop, err := m.serve(ctx, o)
	if err != nil {
		return err
	}
	defer stop()
	return o.Client.Lead(ctx, netconf.Namespace, Component, o.Identity, func(ctx context.Context) error {
		m.lead(true)
		defer m.lead(false)
		return allocate(ctx, o, m)
	})
}

// allocator is a controller that leads.
type allocator struct {
	Options
	*monitor
	view   *kube.BalancerView
	writes *kube.Publisher
	events *kube.Recorder
	gifts  *gifts
	wake   func()
	told   map[service.Name]string // what was last reported about a Service
	key    time.Time               // when the key was last checked
	// problems are those of Services, including ones that have nothing to do with pools.
	problems *problems
	policies *policyBook
	written  map[policy.ID]bool // policies whose condition is being written

	refusals refusals
}

func allocate(ctx context.Context, o Options, m *monitor) error {
	o.Log.Info("this controller leads", "identity", o.Identity)
	changed := wake.New()
	a := &allocator{Options: o, monitor: m, told: map[service.Name]string{}, gifts: newGifts(), wake: changed.Set, problems: newProblems(),
		writes: kube.NewPublisher(o.Log, changed.Set), events: o.Client.NewRecorder(ctx, kube.Reporter{Component: Component, Instance: o.Identity})}
	a.view = o.Client.BalancerView(ctx, Component, changed.Set)
	a.policies, a.written = watchPolicies(ctx, o.Client, changed.Set), map[policy.ID]bool{}
	// After the end of the leadership no write may be under way: it could conflict with the next leader's.
	var writing sync.WaitGroup
	defer writing.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	writing.Go(func() { a.writes.Run(ctx) })
	tick := time.NewTicker(o.Resync)
	defer tick.Stop()
	changed.Set()
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		case <-again:
		}
		again = nil
		a.pass()
		a.passed(a.view.Synced(), a.writes.Err())
		if a.refusals.wait() {
			again = time.After(settled)
		}
		// Events that arrive together cause one pass.
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// pause is the minimal interval between two passes.
const pause = 20 * time.Millisecond

// pass makes the API say what it should. It waits for no answer: what was written comes back by the watches.
func (a *allocator) pass() {
	if time.Since(a.key) >= a.Resync {
		a.writes.Publish("key", a.ensureKey)
		a.key = time.Now()
	}
	a.tellPolicies()
	if !a.view.Synced() {
		return
	}
	pools := vip.Read(vip.Objects{Pools: a.view.AddressPools.All(), Nodes: a.view.Nodes.All(), Services: a.view.ServiceCIDRs.All(), PodPools: a.view.PodPools.All()})
	namespaces := map[string]labels.Set{}
	for _, n := range a.view.Namespaces.All() {
		namespaces[n.Name] = n.Labels
	}
	services := map[service.Name]*corev1.Service{}
	all := a.view.Services.All()
	for _, s := range all {
		services[service.Name{Namespace: s.Namespace, Name: s.Name}] = s
	}
	assignments := pools.Assign(all, namespaces)
	a.takeSessions()
	a.keepPools()
	a.takeBack(all)
	leaving := a.leaving(all, assignments)
	for _, x := range assignments {
		a.assign(services[x.Service], x, leaving, len(pools) > 0)
	}
	for name := range a.told {
		if s := services[name]; s == nil || !vip.Ours(s) {
			delete(a.told, name)
		}
	}
	statuses := map[string]v1alpha1.AddressPoolStatus{}
	for i := range pools {
		statuses[pools[i].Name] = a.tellPool(&pools[i], assignments)
	}
	a.see(assignments, statuses)
	a.tellProblems()
}

// addresses returns the addresses in a Service's status.
func addresses(s *corev1.Service) (list []netip.Addr) {
	for _, in := range s.Status.LoadBalancer.Ingress {
		if addr, err := netip.ParseAddr(in.IP); err == nil {
			list = append(list, addr)
		}
	}
	return list
}

// assign writes what a Service should have to its status, and reports it. A Service gets no address that another one has
// and is to lose, or may still get by a write under way: the other's status has to lose it first.
func (a *allocator) assign(s *corev1.Service, x vip.Assignment, leaving map[netip.Addr]bool, anyPools bool) {
	has := addresses(s)
	now := slices.DeleteFunc(slices.Clone(x.Addresses), func(addr netip.Addr) bool { return leaving[addr] && !slices.Contains(has, addr) })
	want := vip.Ingress(now)
	finalizers := vip.Finalizers(s, len(want) > 0)
	differs := !slices.EqualFunc(s.Status.LoadBalancer.Ingress, want, sameIngress) || len(finalizers) != len(s.Finalizers) && (len(want) > 0 || vip.Wrote(s))
	object := serviceWrite(s)
	switch turn := a.gifts.supersede(object); {
	// In a cluster without pools, Services without a class may belong to another controller.
	case !differs, len(want) == 0 && !anyPools && !vip.Wrote(s):
		a.writes.Withdraw(object)
	default:
		a.writes.Publish(object, func(ctx context.Context) error {
			if !a.gifts.begin(object, turn, gift{s.ResourceVersion, now}) {
				return nil
			}
			switch err := a.Client.SetIngress(ctx, s, Component, want, finalizers); {
			case apierrors.IsConflict(err): // the newer version is about to arrive, and wakes the loop
				return nil
			case err != nil:
				if a.gifts.failed(object, turn) {
					a.wake()
				}
				return err
			}
			a.Log.Info("wrote the addresses of a Service", "service", x.Service.String(), "addresses", now, "pools", x.Pools)
			for i, addr := range x.Addresses {
				if slices.Contains(now, addr) && !slices.Contains(has, addr) {
					a.record(s, kube.Event{Reason: "AddressAssigned", Message: fmt.Sprintf("%s of AddressPool %s", addr, x.Pools[i])})
				}
			}
			return nil
		})
	}
	if x.Text != a.told[x.Service] {
		if x.Text != "" {
			a.record(s, kube.Event{Warning: true, Reason: x.Reason, Message: x.Text})
		}
		a.told[x.Service] = x.Text
	}
}

// serviceWrite is a Service's name among the publisher's objects.
func serviceWrite(s *corev1.Service) string { return "service/" + s.Namespace + "/" + s.Name }

func sameIngress(a, b corev1.LoadBalancerIngress) bool {
	return a.IP == b.IP && a.Hostname == b.Hostname && a.IPMode != nil && *a.IPMode == *b.IPMode && len(a.Ports) == len(b.Ports)
}

// takeBack removes addresses from Services that no longer belong to this controller, if it assigned them.
func (a *allocator) takeBack(all []*corev1.Service) {
	for _, s := range all {
		switch {
		case vip.Ours(s):
			continue
		case !vip.Wrote(s):
			a.writes.Withdraw(serviceWrite(s))
			continue
		}
		a.writes.Publish(serviceWrite(s), func(ctx context.Context) error {
			err := a.Client.SetIngress(ctx, s, Component, nil, vip.Finalizers(s, false))
			if apierrors.IsConflict(err) {
				return nil
			}
			return err
		})
	}
}

// takeSessions removes sessions of deleted nodes from the status of BGPPeers. Agents may write only their own entries. The
// entry of a node that was just created may be removed too early: its agent writes it again.
func (a *allocator) takeSessions() {
	nodes := map[string]bool{}
	for _, n := range a.view.Nodes.All() {
		nodes[n.Name] = true
	}
	for _, p := range a.view.BGPPeers.All() {
		var gone []string
		for _, s := range p.Status.Sessions {
			if !nodes[s.Node] {
				gone = append(gone, s.Node)
			}
		}
		object := "bgppeer/" + p.Name
		if len(gone) == 0 {
			a.writes.Withdraw(object)
			continue
		}
		a.writes.Publish(object, func(ctx context.Context) error {
			for _, node := range gone {
				if err := a.Client.PublishBGPSession(ctx, p.Name, node, nil); err != nil {
					return err
				}
			}
			return nil
		})
	}
}

// tellPool writes the status of a pool, and records an event if it has become valid or invalid.
func (a *allocator) tellPool(p *vip.Pool, assignments []vip.Assignment) v1alpha1.AddressPoolStatus {
	status, differs := p.Status(assignments, time.Now())
	object := "addresspool/" + p.Name
	if !differs {
		a.writes.Withdraw(object)
		return status
	}
	was := meta.FindStatusCondition(p.Object().Status.Conditions, v1alpha1.PoolValid)
	is := meta.FindStatusCondition(status.Conditions, v1alpha1.PoolValid)
	reference := kube.Reference(p.Object())
	a.writes.Publish(object, func(ctx context.Context) error {
		if err := kube.SetStatus(ctx, a.Client, kube.AddressPools, p.Name, status); err != nil {
			return err
		}
		if was == nil || was.Status != is.Status || was.Message != is.Message {
			a.events.Record(kube.Event{Object: reference, Warning: is.Status != metav1.ConditionTrue, Reason: is.Reason, Message: is.Message})
		}
		return nil
	})
	return status
}

// ensureKey creates the key for the agents' membership. Without it they have to learn from the API server which nodes live.
func (a *allocator) ensureKey(ctx context.Context) error {
	key := make([]byte, keyset.Size)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	return a.Client.EnsureSecret(ctx, netconf.Namespace, keyset.Secret, map[string][]byte{keyset.Key: key})
}

func (a *allocator) record(s *corev1.Service, e kube.Event) {
	e.Object = kube.Reference(s)
	a.events.Record(e)
}
