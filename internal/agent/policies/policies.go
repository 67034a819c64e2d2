// Package policies keeps the cluster's NetworkPolicies and ClusterNetworkPolicies in the kernel of a node: it follows policies, and once there
// are some, namespaces and pods, and has the kernel drop what they do not allow. docs/design/policy.md.
//
// Nothing becomes more open by an agent that starts, ends or fails: what the kernel holds stays until all is known.
package policies

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/wake"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Options are what a Keeper is told when it is made.
type Options struct {
	Node   string
	Client *kube.Client
	// Cluster are the ClusterNetworkPolicies; without, the client's.
	Cluster *kube.Resource[*cnp.ClusterNetworkPolicy]
	Log     *slog.Logger
	// Changed is called when Status or Free may say something else. It must not block.
	Changed func()
	// Resync is how often the kernel is compared.
	Resync time.Duration
	// NetNS is where the runtime mounts pods' network namespaces.
	NetNS string
	// Events, if not nil, are told of what policies drop.
	Events *kube.Recorder
	// Closed is a file that is there while the kernel holds policies. It has to go with the boot, as they do.
	Closed string
}

// Keeper keeps policies in the kernel of a node.
type Keeper struct {
	Options
	kick    wake.Signal
	metrics *metrics
	recheck wake.Signal           // what is there is to be rechecked
	open    func() (Flows, error) // for rechecks
	packets func() (Packets, error)
	records records
	// What follows is Run's alone.
	rules *ruleset.Ruleset
	setTo []netip.Prefix // the ranges that the kernel was set for

	mu    sync.Mutex
	model *policy.Model
	known bool // what is in the kernel is what the API says, or was at some time
	on    bool // there are policies, and the kernel holds them
	// held are the own pods' addresses as the kernel has them.
	held   map[netip.Addr]policy.Address
	ranges []netip.Prefix // of the node's pods
	// own are the node's own pods, and given what they were given by the plugin, which the API tells of later.
	own     map[service.Name]ownPod
	given   map[service.Name]gift
	problem string
	// established says what becomes of connections that are there; it is empty until it is known. facts are what the kernel holds, the
	// Model's own, which only Changes changes. clean says that no connection has a mark.
	established netconf.PolicyEstablished
	facts       policy.Facts
	clean       bool
	// nodeAddrs are the node's own addresses, as of the last look.
	nodeAddrs  map[netip.Addr]bool
	nodeLooked time.Time
	// isolatedSince are addresses of pods that have been isolated for moments only.
	isolatedSince map[netip.Addr]time.Time
	turned        chan struct{} // closed when what is held has changed
	fast          fastState
}

// ownPod is a pod of the node as the API has it.
type ownPod struct {
	policy.Pod
	uid string
}

// gift are the addresses of a pod as the plugin gave them.
type gift struct {
	uid   string // empty if the runtime does not tell
	addrs []netip.Addr
	at    time.Time
}

// New makes a Keeper, which does nothing until Run.
func New(o Options) *Keeper {
	return &Keeper{Options: o, kick: wake.New(), recheck: wake.New(), open: openFlows, packets: openPackets, records: records{all: map[recordKey]*record{}}, isolatedSince: map[netip.Addr]time.Time{}, metrics: newMetrics(), model: policy.NewModel(o.Node), held: map[netip.Addr]policy.Address{},
		own: map[service.Name]ownPod{}, given: map[service.Name]gift{}, turned: make(chan struct{})}
}

// SetRanges tells which addresses are those of the node's pods. It does not wait.
func (k *Keeper) SetRanges(list []netip.Prefix) {
	k.mu.Lock()
	same := slices.Equal(k.ranges, list)
	k.ranges = slices.Clone(list)
	k.mu.Unlock()
	if !same {
		k.kick.Set()
	}
}

// Status says whether the kernel holds what policies there are, and if not, why.
func (k *Keeper) Status() (known bool, problem string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.known, k.problem
}

// On says that there are policies and the kernel holds them.
func (k *Keeper) On() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.on
}

// Problems returns what is wrong with policies, in order.
func (k *Keeper) Problems() (all []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, list := range k.model.Problems() {
		for _, p := range list {
			all = append(all, fmt.Sprintf("%s: %s", id, p))
		}
	}
	slices.Sort(all)
	return all
}

// Free returns the addresses of the node's pods that no policy isolates, nil if there is no policy at all and every pod is free. It is
// not known until the API was seen once, and the fast path's maps follow it: what was before is then to stay.
func (k *Keeper) Free() (free map[netip.Addr]bool, known bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if known = k.known && k.fast.isSettled(); !known || !k.on {
		return nil, known
	}
	free = map[netip.Addr]bool{}
	for a, is := range k.held {
		if is.Free() {
			free[a] = true
		}
	}
	return free, true
}

// Lease is what a pod of the node was attached with.
type Lease struct {
	Pod   service.Name
	UID   string // empty if the runtime does not tell
	Addrs []netip.Addr
}

// SetLeases tells of all pods that are attached, also while no agent ran. It does not wait.
func (k *Keeper) SetLeases(list []Lease) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.isOff() {
		return
	}
	leased := map[service.Name]bool{}
	for _, l := range list {
		leased[l.Pod] = true
		if _, known := k.given[l.Pod]; !known {
			k.give(l.Pod, gift{uid: l.UID, addrs: l.Addrs})
		}
	}
	maps.DeleteFunc(k.given, func(name service.Name, g gift) bool { return !leased[name] && time.Since(g.at) > giftPatience })
	k.kick.Set()
}

// giftPatience is longer than any lease takes to be listed.
const giftPatience = time.Minute

// isOff says that there are no policies, nor any that the kernel does not hold yet.
func (k *Keeper) isOff() bool { return k.known && !k.on && k.model.Size().Policies == 0 }

// Await tells what a pod is attached with, and returns when its policies are in the kernel. The error is the context's, with what it waited
// for, if they are not in time.
func (k *Keeper) Await(ctx context.Context, l Lease) error {
	began := time.Now()
	k.mu.Lock()
	if !k.isOff() {
		k.give(l.Pod, gift{l.UID, l.Addrs, began})
	}
	k.mu.Unlock()
	k.kick.Set()
	for {
		k.mu.Lock()
		known, off, turned := k.known, k.isOff(), k.turned
		missing := slices.ContainsFunc(l.Addrs, func(a netip.Addr) bool { return !k.held[a].Own })
		k.mu.Unlock()
		if off || known && !missing {
			k.metrics.waited.Observe(time.Since(began).Seconds())
			return nil
		}
		select {
		case <-turned:
		case <-ctx.Done():
			if !known {
				return fmt.Errorf("the API server has not told this node of its policies yet: %w", ctx.Err())
			}
			return fmt.Errorf("the policies of pod %s are not in the kernel yet: %w", l.Pod, ctx.Err())
		}
	}
}

// give keeps what a pod was given, and tells the Model if the pod is known.
func (k *Keeper) give(name service.Name, g gift) {
	k.given[name] = g
	k.setOwn(name)
}

// setOwn tells the Model of an own pod, with the addresses that it was given: the API has those of a sandbox before as long as the kubelet
// has not told it of the new one.
func (k *Keeper) setOwn(name service.Name) {
	p, found := k.own[name]
	if !found {
		return
	}
	if g, given := k.given[name]; given && g.isOf(p.uid) {
		p.Addrs = g.addrs
	}
	k.model.SetPod(p.Pod)
}

// isOf says whether it was given to the pod of this UID. The kubelet's UIDs of static pods are digests, the API's have hyphens.
func (g gift) isOf(uid string) bool {
	return g.uid == "" || g.uid == uid || !strings.Contains(g.uid, "-")
}

func (k *Keeper) setPod(o *corev1.Pod) {
	p, ok := policyfacts.Pod(o)
	name := service.Name{Namespace: o.Namespace, Name: o.Name}
	k.mu.Lock()
	switch {
	case !ok:
		delete(k.own, name)
		delete(k.given, name)
		k.model.DeletePod(name)
	case o.Spec.NodeName == k.Node:
		k.own[name] = ownPod{p, string(o.UID)}
		k.setOwn(name)
	default:
		delete(k.own, name)
		k.model.SetPod(p)
	}
	k.mu.Unlock()
	k.kick.Set()
}

func (k *Keeper) deletePod(name service.Name) {
	k.mu.Lock()
	delete(k.own, name)
	delete(k.given, name)
	k.model.DeletePod(name)
	k.mu.Unlock()
	k.kick.Set()
}

// locked returns a function that changes the Model, and has the change come to the kernel.
func locked[T any](k *Keeper, change func(T)) func(T) {
	return func(x T) {
		k.mu.Lock()
		change(x)
		k.mu.Unlock()
		k.kick.Set()
	}
}

// watches are those of what policies are about. Namespaces and pods are watched once there is a policy: without any, a cluster's pods cost
// its nodes nothing.
type watches struct {
	policies   *kube.Store[*networkingv1.NetworkPolicy]
	cluster    *kube.Store[*cnp.ClusterNetworkPolicy]
	namespaces *kube.Store[*corev1.Namespace]
	pods       *kube.Store[*corev1.Pod]
	nodes      *kube.Store[*corev1.Node] // once a policy is about nodes
}

// policiesListed says whether it is known which policies there are. A cluster may lack the kind ClusterNetworkPolicy.
func (w *watches) policiesListed() bool { return w.policies.Listed() && w.cluster.Synced() }

func (k *Keeper) watchPolicies(ctx context.Context) *kube.Store[*networkingv1.NetworkPolicy] {
	return kube.Watch(ctx, k.Client, kube.NetworkPolicies, kube.Options[*networkingv1.NetworkPolicy]{
		Changed: k.kick.Set, Refused: k.refused,
		Set:     locked(k, func(p *networkingv1.NetworkPolicy) { k.model.SetPolicy(policyfacts.NetworkPolicy(p)) }),
		Deleted: locked(k, func(n service.Name) { k.model.DeletePolicy(policyfacts.ID(n)) }),
	})
}

func (k *Keeper) watchCluster(ctx context.Context) *kube.Store[*cnp.ClusterNetworkPolicy] {
	resource := kube.ClusterNetworkPolicies
	if k.Cluster != nil {
		resource = *k.Cluster
	}
	return kube.Watch(ctx, k.Client, resource, kube.Options[*cnp.ClusterNetworkPolicy]{
		Optional: true, Changed: k.kick.Set, Refused: k.refused,
		Set:     locked(k, func(p *cnp.ClusterNetworkPolicy) { k.model.SetPolicy(policyfacts.ClusterNetworkPolicy(p)) }),
		Deleted: locked(k, func(n service.Name) { k.model.DeletePolicy(policyfacts.ClusterID(n.Name)) }),
	})
}

func (k *Keeper) watchNodes(ctx context.Context) *kube.Store[*corev1.Node] {
	return kube.Watch(ctx, k.Client, kube.Nodes, kube.Options[*corev1.Node]{
		Changed: k.kick.Set, Refused: k.refused,
		Set:     locked(k, func(n *corev1.Node) { k.model.SetNode(policyfacts.Node(n)) }),
		Deleted: locked(k, func(n service.Name) { k.model.DeleteNode(n.Name) }),
	})
}

func (w *watches) begin(ctx context.Context, k *Keeper) {
	w.namespaces = kube.Watch(ctx, k.Client, kube.Namespaces, kube.Options[*corev1.Namespace]{
		Changed: k.kick.Set, Refused: k.refused,
		Set:     locked(k, func(n *corev1.Namespace) { k.model.SetNamespace(n.Name, n.Labels) }),
		Deleted: locked(k, func(n service.Name) { k.model.DeleteNamespace(n.Name) }),
	})
	w.pods = kube.Watch(ctx, k.Client, kube.Pods, kube.Options[*corev1.Pod]{
		Changed: k.kick.Set, Refused: k.refused, Set: k.setPod, Deleted: k.deletePod,
	})
}

// refused keeps why a watch fails, until all is known.
func (k *Keeper) refused(err error) {
	k.mu.Lock()
	known := k.known
	k.mu.Unlock()
	if !known {
		k.fail(err)
	}
}

func (k *Keeper) fail(err error) {
	k.mu.Lock()
	same := k.problem == err.Error()
	k.problem = err.Error()
	k.mu.Unlock()
	if !same {
		k.Log.Error("policies", "error", err)
		k.Changed()
	}
}

// retry is how long after an error everything is set again.
const retry = time.Second

// Run follows policies until the context ends. What is in the kernel stays.
func (k *Keeper) Run(ctx context.Context) {
	w := watches{policies: k.watchPolicies(ctx), cluster: k.watchCluster(ctx)}
	resync, again := time.NewTicker(k.Resync), time.NewTicker(retry)
	defer resync.Stop()
	defer again.Stop()
	var comparing chan bool // what the kernel was found to hold, nil while nobody looks
	defer func() {
		if comparing != nil {
			<-comparing
		}
		if k.rules != nil {
			k.rules.Close()
		}
	}()
	var rechecks sync.WaitGroup
	defer rechecks.Wait()
	rechecks.Go(func() { k.runRechecks(ctx) })
	rechecks.Go(func() { k.runRecords(ctx) })
	whole := true
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.kick:
		case <-again.C:
			if !whole {
				continue
			}
		case <-resync.C:
			if comparing == nil && !whole {
				comparing = k.compare(ctx)
			}
			continue
		case holds := <-comparing:
			if comparing = nil; holds {
				continue
			}
			whole = true
		}
		if !w.policiesListed() {
			continue
		}
		began := time.Now()
		changed, err := k.step(ctx, &w, whole)
		if err != nil {
			k.fail(fmt.Errorf("set the policies: %w", err))
			whole = true
			continue
		}
		if changed {
			k.metrics.seconds.Observe(time.Since(began).Seconds())
			whole = false
		}
	}
}

// compare looks in another goroutine whether the kernel holds what was left there, and answers once.
func (k *Keeper) compare(ctx context.Context) chan bool {
	k.mu.Lock()
	on, fast := k.on, k.fast
	k.mu.Unlock()
	if !on {
		return nil
	}
	answer, rules := make(chan bool, 1), k.rules
	go func() {
		holds, err := rules.HoldsPolicies(ctx)
		if fast.holds && holds && err == nil {
			holds, err = fast.path.Holds()
		}
		if err != nil && ctx.Err() == nil {
			k.Log.Warn("policies", "error", err)
		}
		answer <- holds && err == nil
	}()
	return answer
}

// step brings the kernel from what it holds to what is known now, and says whether it could.
func (k *Keeper) step(ctx context.Context, w *watches, whole bool) (done bool, err error) {
	if k.rules == nil {
		if k.rules, err = ruleset.Open(link.OwnNetNS); err != nil {
			return false, err
		}
	}
	k.mu.Lock()
	any, on, known, ranges := k.model.Size().Policies > 0, k.on, k.known, k.ranges
	nodes, settled := k.model.LooksAtNodes(), k.fast.isSettled()
	k.mu.Unlock()
	if any && w.pods == nil {
		w.begin(ctx, k)
	}
	if nodes && w.nodes == nil {
		w.nodes = k.watchNodes(ctx)
	}
	switch {
	case !any && known && !on && !whole && settled:
		return true, nil
	case !any:
		if err := k.rules.DeletePolicies(); err != nil {
			return false, err
		}
		if err := k.mark(false); err != nil {
			return false, err
		}
		k.mu.Lock()
		facts := k.model.Facts() // of pods, whom nobody isolates
		k.facts = facts
		k.mu.Unlock()
		if err := k.followFast(facts, policy.Facts{}, true); err != nil {
			return false, err
		}
		k.turn(policy.Facts{}, false, true)
		k.recheck.Set()
		return true, nil
	case !w.namespaces.Listed() || !w.pods.Listed() || nodes && !w.nodes.Listed() || len(ranges) == 0:
		return false, nil
	}
	k.mu.Lock()
	changes := k.model.Changes()
	narrowed := k.model.Narrowed()
	facts := k.model.Facts() // which only Changes changes
	k.facts = facts
	k.mu.Unlock()
	if whole || !on || !slices.Equal(ranges, k.setTo) {
		count, err := k.rules.SetPolicies(facts, ranges)
		if err != nil {
			return false, err
		}
		k.metrics.count(count)
		k.setTo = ranges
		if err := k.mark(true); err != nil {
			return false, err
		}
		if err := k.followFast(facts, policy.Facts{}, true); err != nil {
			return false, err
		}
		k.turn(facts, true, true)
		k.recheck.Set()
		return true, nil
	}
	if len(changes.Addrs)+len(changes.Classes) > 0 {
		if err := k.rules.ChangePolicies(changes); err != nil {
			return false, err
		}
	}
	if err := k.followFast(facts, changes, false); err != nil {
		return false, err
	}
	k.turn(changes, true, false)
	if narrowed {
		k.recheck.Set()
	}
	return true, nil
}

// mark makes the file that says that the kernel holds policies, or takes it away.
func (k *Keeper) mark(on bool) error {
	if on {
		return os.WriteFile(k.Closed, nil, 0o600)
	}
	if err := os.Remove(k.Closed); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// turn keeps what the kernel holds now of own pods' addresses, of which f has all if whole, or what has changed, and tells whoever waits.
func (k *Keeper) turn(f policy.Facts, on, whole bool) {
	k.mu.Lock()
	before := maps.Clone(k.held)
	if whole {
		clear(k.held)
	}
	for a, is := range f.Addrs {
		if delete(k.held, a); is.Own {
			k.held[a] = is
		}
		if is.Own && !is.Free() {
			if was, there := before[a]; !k.on || there && was.Free() {
				k.isolatedSince[a] = time.Now()
			}
		}
	}
	same := k.known && k.on == on && k.problem == "" && maps.Equal(before, k.held)
	k.known, k.on, k.problem = true, on, ""
	close(k.turned)
	k.turned = make(chan struct{})
	k.mu.Unlock()
	if !same {
		k.Changed()
	}
}

// Describe implements prometheus.Collector.
func (k *Keeper) Describe(c chan<- *prometheus.Desc) { k.metrics.describe(c) }

// Collect implements prometheus.Collector.
func (k *Keeper) Collect(c chan<- prometheus.Metric) {
	k.mu.Lock()
	size, fast := k.model.Size(), k.fast
	k.mu.Unlock()
	k.metrics.collect(c, size, fast)
}
