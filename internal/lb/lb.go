// Package lb is the controller of a cluster: it gives Services of type LoadBalancer addresses of AddressPools, says of
// pools how full they are, keeps IPPools for as long as blocks of them are left, and takes from BGPPeers what nodes said that
// are gone. Who answers for an address is each node's own to decide; package dataplane.
//
// Like an agent it has one loop, from the whole of what is known to the whole of what should be: docs/design/load-balancer.md.
package lb

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/kube"
	"github.com/fathom-network/fathom/internal/membership"
	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/serve"
	"github.com/fathom-network/fathom/internal/vip"
)

// Component is the controller's name: in events, as the owner of what it writes, and of its Lease.
const Component = vip.Owner

// Options are what a controller is told at its start.
type Options struct {
	Client *kube.Client
	Log    *slog.Logger
	// Identity is the process's name among those that want to lead.
	Identity string
	// Resync is how often everything is compared without an event to ask for it.
	Resync time.Duration
	// Health and Metrics are HOST:PORT to listen at for probes and for Prometheus; empty does not listen.
	Health, Metrics string
	// MetricsAccess says who may read Metrics.
	MetricsAccess serve.Access
}

// Run waits until it leads, and then gives out addresses until the context ends. An error means that it leads no more,
// or has never begun to.
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
	view *kube.BalancerView
	told map[types.NamespacedName]string // what was said of a Service last
	key  time.Time                       // when it was last seen to be there
	// problems are those of Services that have nothing to do with pools, too.
	problems *problems

	refusals refusals
}

func allocate(ctx context.Context, o Options, m *monitor) error {
	o.Log.Info("this controller leads", "identity", o.Identity)
	wake := make(chan struct{}, 1)
	a := &allocator{Options: o, monitor: m, told: map[types.NamespacedName]string{}, problems: newProblems()}
	var err error
	if a.view, err = o.Client.BalancerView(ctx, Component, func() {
		select {
		case wake <- struct{}{}:
		default:
		}
	}); err != nil {
		return err
	}
	tick := time.NewTicker(o.Resync)
	defer tick.Stop()
	again := time.After(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-tick.C:
		case <-again:
		}
		again = nil
		err := a.pass(ctx)
		a.passed(a.view.Synced(), err)
		if err != nil && ctx.Err() == nil {
			o.Log.Warn("not all is as it should be; it is tried again", "error", err)
			again = time.After(retry)
		} else if a.refusals.wait() {
			again = time.After(settled)
		}
		// What comes at once is looked at at once; a burst is one look.
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

const (
	// retry is how long after an error everything is tried again.
	retry = time.Second
	// pause is the least time between two looks at everything.
	pause = 20 * time.Millisecond
)

// pass makes the API say what it should.
func (a *allocator) pass(ctx context.Context) error {
	if time.Since(a.key) >= a.Resync {
		if err := a.ensureKey(ctx); err != nil {
			a.Log.Warn("agents notice late that a node has lost power", "error", err)
		}
		a.key = time.Now()
	}
	if !a.view.Synced() {
		return nil
	}
	pools := vip.Read(vip.Objects{Pools: a.view.AddressPools(), Nodes: a.view.Nodes(), Services: a.view.ServiceCIDRs(), PodPools: a.view.PodPools()})
	namespaces := map[string]labels.Set{}
	for _, n := range a.view.Namespaces() {
		namespaces[n.Name] = n.Labels
	}
	services := map[types.NamespacedName]*corev1.Service{}
	all := a.view.Services()
	for _, s := range all {
		services[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = s
	}
	assignments := pools.Assign(all, namespaces)
	errs := []error{a.takeBack(ctx, all), a.takeSessions(ctx), a.keepPools(ctx)}
	// Addresses that change hands are taken from the one before the other gets them.
	for _, losing := range []bool{true, false} {
		for _, x := range assignments {
			s := services[x.Service]
			if loses(s, x.Addresses) == losing {
				errs = append(errs, a.assign(ctx, s, x, len(pools) > 0))
			}
		}
	}
	for name := range a.told {
		if s := services[name]; s == nil || !vip.Ours(s) {
			delete(a.told, name)
		}
	}
	statuses := map[string]v1alpha1.AddressPoolStatus{}
	for i := range pools {
		status, err := a.tellPool(ctx, &pools[i], assignments)
		statuses[pools[i].Name] = status
		errs = append(errs, err)
	}
	a.see(assignments, statuses)
	a.tellProblems(ctx)
	return errors.Join(errs...)
}

// loses says whether a Service has an address that it is not to have.
func loses(s *corev1.Service, want []netip.Addr) bool {
	for _, in := range s.Status.LoadBalancer.Ingress {
		if addr, err := netip.ParseAddr(in.IP); err != nil || !slices.Contains(want, addr) {
			return true
		}
	}
	return false
}

// assign writes what a Service has, and tells of it.
func (a *allocator) assign(ctx context.Context, s *corev1.Service, x vip.Assignment, anyPools bool) error {
	want := vip.Ingress(x.Addresses)
	finalizers := vip.Finalizers(s, len(want) > 0)
	if !slices.EqualFunc(s.Status.LoadBalancer.Ingress, want, sameIngress) || len(finalizers) != len(s.Finalizers) && (len(want) > 0 || vip.Wrote(s)) {
		// A cluster without pools may have another's controller for Services without a class.
		if len(want) == 0 && !anyPools && !vip.Wrote(s) {
			return nil
		}
		if err := a.Client.SetIngress(ctx, s, Component, want, finalizers); err != nil {
			if apierrors.IsConflict(err) {
				return nil // what has changed is on its way here, and wakes the loop
			}
			return err
		}
		a.Log.Info("wrote the addresses of a Service", "service", x.Service.String(), "addresses", x.Addresses, "pools", x.Pools)
		for i, addr := range x.Addresses {
			if !slices.ContainsFunc(s.Status.LoadBalancer.Ingress, func(in corev1.LoadBalancerIngress) bool { return in.IP == addr.String() }) {
				a.record(ctx, s, kube.Event{Reason: "AddressAssigned", Message: fmt.Sprintf("%s of AddressPool %s", addr, x.Pools[i])})
			}
		}
	}
	if x.Text != a.told[x.Service] {
		if x.Text != "" {
			a.record(ctx, s, kube.Event{Warning: true, Reason: x.Reason, Message: x.Text})
		}
		a.told[x.Service] = x.Text
	}
	return nil
}

func sameIngress(a, b corev1.LoadBalancerIngress) bool {
	return a.IP == b.IP && a.Hostname == b.Hostname && a.IPMode != nil && *a.IPMode == *b.IPMode && len(a.Ports) == len(b.Ports)
}

// takeBack takes the addresses of Services that are not ours any more, if it was us who gave them.
func (a *allocator) takeBack(ctx context.Context, all []*corev1.Service) error {
	var errs []error
	for _, s := range all {
		if vip.Ours(s) || !vip.Wrote(s) {
			continue
		}
		if err := a.Client.SetIngress(ctx, s, Component, nil, vip.Finalizers(s, false)); err != nil && !apierrors.IsConflict(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// takeSessions takes from the status of BGPPeers what nodes have said that the cluster no longer has. The agents may write
// no entries but their own. Of a node that has only just come an entry may be taken too early: its agent writes it again.
func (a *allocator) takeSessions(ctx context.Context) error {
	nodes := map[string]bool{}
	for _, n := range a.view.Nodes() {
		nodes[n.Name] = true
	}
	var errs []error
	for _, p := range a.view.BGPPeers() {
		for _, s := range p.Status.Sessions {
			if !nodes[s.Node] {
				errs = append(errs, a.Client.PublishBGPSession(ctx, p.Name, s.Node, nil))
			}
		}
	}
	return errors.Join(errs...)
}

// tellPool writes the status of a pool, and makes an event where it has become good or bad.
func (a *allocator) tellPool(ctx context.Context, p *vip.Pool, assignments []vip.Assignment) (v1alpha1.AddressPoolStatus, error) {
	status, differs := p.Status(assignments, time.Now())
	if !differs {
		return status, nil
	}
	if err := a.Client.SetAddressPoolStatus(ctx, p.Name, status); err != nil {
		return status, err
	}
	was := meta.FindStatusCondition(p.Object().Status.Conditions, v1alpha1.PoolValid)
	is := meta.FindStatusCondition(status.Conditions, v1alpha1.PoolValid)
	if was != nil && was.Status == is.Status && was.Message == is.Message {
		return status, nil
	}
	a.send(ctx, kube.Event{Object: kube.AddressPoolReference(p.Object()), Warning: is.Status != metav1.ConditionTrue, Reason: is.Reason, Message: is.Message})
	return status, nil
}

// ensureKey makes the key by which agents know each other, and without which they ask the API server which nodes live.
func (a *allocator) ensureKey(ctx context.Context) error {
	key := make([]byte, membership.KeySize)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	return a.Client.EnsureSecret(ctx, netconf.Namespace, membership.Secret, map[string][]byte{membership.SecretKey: key})
}

func (a *allocator) record(ctx context.Context, s *corev1.Service, e kube.Event) {
	e.Object = kube.ServiceReference(types.NamespacedName{Namespace: s.Namespace, Name: s.Name})
	e.Object.UID = s.UID // by which `kubectl describe` finds it
	a.send(ctx, e)
}

func (a *allocator) send(ctx context.Context, e kube.Event) {
	const longest = 1024 // the API's limit
	if len(e.Message) > longest {
		e.Message = e.Message[:longest-4] + " ..."
	}
	if err := a.Client.Record(ctx, kube.Reporter{Component: Component, Instance: a.Identity}, e); err != nil {
		a.Log.Warn("an event was lost", "error", err)
	}
}
