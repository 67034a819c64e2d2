package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// poolObjects returns what the watches hold about address pools.
func (a *Agent) poolObjects() ippool.Objects {
	return ippool.Objects{Pools: a.view.Pools.All(), Blocks: a.view.Blocks.All(), Nodes: a.view.Nodes.All(),
		Services:     a.view.ServiceCIDRs.All(),
		AddressPools: a.view.AddressPools.All()}
}

// tellRefused counts and logs the blocks that no node uses. The controller sends the event: one, not one per node.
func (a *Agent) tellRefused(refused []ippool.RefusedBlock) {
	a.metrics.refused.Set(float64(len(refused)))
	const most = 10 // there may be many, and anyone who may write blocks can make them
	var now []string
	for _, r := range refused[:min(len(refused), most)] {
		now = append(now, r.String())
		if !slices.Contains(a.refused, r.String()) {
			a.Log.Warn("a block is not used", "what", r.String(), "all", len(refused))
		}
	}
	a.refused = now
}

// keepBlocks has the node's blocks of address pools become what its pods need, and pools told what is known of them. Its
// problems are what was in the way last time.
func (a *Agent) keepBlocks(_ context.Context, p *pass) outcome {
	if wait := a.tellPools(); wait > 0 {
		time.AfterFunc(wait, a.Wake)
	}
	return outcome{problems: a.keeper.Set(segments(p.interfaces), a.config.CoolDown)}
}

// segments returns the networks to which the node itself is attached.
func segments(interfaces []podnet.Interface) []netip.Prefix {
	var list []netip.Prefix
	for _, i := range interfaces {
		for _, p := range i.Addrs {
			list = append(list, p.Masked())
		}
	}
	return list
}

// tellPools publishes the status of pools that is out of date, when it is this node's turn. It returns the time until the next
// turn, or 0.
func (a *Agent) tellPools() (wait time.Duration) {
	f, now := ippool.Read(a.poolObjects()), time.Now()
	settle := func(name string) {
		delete(a.poolsDiffer, name)
		a.writes.Withdraw(poolWrite + name)
	}
	for name := range a.poolsDiffer {
		if _, found := f.Pool(name); !found {
			settle(name)
		}
	}
	for _, p := range f.Pools {
		if _, differs := f.Status(p, now); !differs {
			if _, known := a.poolsDiffer[p.Name]; known {
				settle(p.Name)
			}
			continue
		}
		since, known := a.poolsDiffer[p.Name]
		if !known {
			since = now
			a.poolsDiffer[p.Name] = now
		}
		if left := f.Turnstile(p.Name, a.Node) - now.Sub(since); left > 0 {
			if wait == 0 || left < wait {
				wait = left
			}
			continue
		}
		a.writes.Publish(poolWrite+p.Name, func(ctx context.Context) error { return a.writePoolStatus(ctx, p.Name) })
	}
	return wait
}

// poolWrite is the prefix of IPPools' names among the publisher's objects.
const poolWrite = "ippool/"

// writePoolStatus writes the status that a pool should have at this moment, unless it has it: between the pass that asked for it
// and an attempt that succeeds, another node may have written it, or blocks may have changed.
func (a *Agent) writePoolStatus(ctx context.Context, name string) error {
	f := ippool.Read(a.poolObjects())
	p, found := f.Pool(name)
	if !found {
		return nil
	}
	status, differs := f.Status(p, time.Now())
	if !differs {
		return nil
	}
	if err := kube.SetStatus(ctx, a.Client, kube.IPPools, name, status); err != nil {
		return err
	}
	was := meta.FindStatusCondition(p.Object().Status.Conditions, v1alpha1.PoolValid)
	is := meta.FindStatusCondition(status.Conditions, v1alpha1.PoolValid)
	if was == nil || was.Status != is.Status || was.Reason != is.Reason {
		a.events.Record(kube.Event{Object: kube.Reference(p.Object()), Warning: is.Status != metav1.ConditionTrue, Reason: is.Reason, Message: is.Message})
	}
	return nil
}

const (
	// podPatience bounds the wait for a pod that the watch has not delivered yet. A whole answer takes less than the two seconds
	// that the plugin waits.
	podPatience = time.Second
	// answerPatience bounds a whole answer.
	answerPatience = 1800 * time.Millisecond
	// routePatience bounds the wait for the routes of a new block.
	routePatience = 300 * time.Millisecond
)

// answerPod answers the plugin which pool and addresses a pod asks for, once the node has a block to give them from.
func (a *Agent) answerPod(w http.ResponseWriter, r *http.Request) {
	if a.view == nil { // Clean runs
		http.Error(w, "the network is being uninstalled", http.StatusServiceUnavailable)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerPatience)
	defer cancel()
	namespace, name, uid := r.PathValue("namespace"), r.PathValue("name"), r.URL.Query().Get("uid")
	pod, err := a.awaitPod(ctx, namespace, name, uid)
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	case pod == nil:
		http.Error(w, "no such pod on this node", http.StatusNotFound)
		return
	}
	var given struct {
		Pool      string       `json:"pool,omitempty"`
		Addresses []netip.Addr `json:"addresses,omitempty"`
	}
	grant, err := a.grant(ctx, pod)
	var refusal *ippool.Refusal
	switch {
	case errors.As(err, &refusal) && !refusal.Later:
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	case err != nil:
		http.Error(w, answer.OneLine(err), http.StatusServiceUnavailable)
	default:
		given.Pool, given.Addresses = grant.Pool, grant.Addresses
		reply(w, given, nil)
	}
}

// awaitPod waits for a pod in the view. It returns nil for a static pod that the API server does not know: the kubelet's UIDs of
// those are digests, the API server's have hyphens.
func (a *Agent) awaitPod(ctx context.Context, namespace, name, uid string) (*corev1.Pod, error) {
	static := uid != "" && !strings.Contains(uid, "-")
	deadline := time.Now().Add(podPatience)
	for {
		synced := a.view.Synced()
		pod, found := a.view.Pods.Get(namespace, name)
		_, hasNamespace := a.view.Namespaces.Get("", namespace)
		switch mirror := found && pod.Annotations[corev1.MirrorPodAnnotationKey] != ""; {
		case found && hasNamespace && (uid == "" || string(pod.UID) == uid || static && mirror):
			return pod, nil
		case static && synced:
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().Before(deadline) {
			continue
		}
		switch {
		// An agent that has never seen the API server cannot tell whether there are pools. If there were none before, pods need
		// no answer.
		case !synced && a.needed(), synced && uid != "":
			return nil, fmt.Errorf("the API server has not told this node of pod %s/%s yet", namespace, name)
		}
		return nil, nil
	}
}

// grant returns what a pod gets, after the kernel has the routes of its block.
func (a *Agent) grant(ctx context.Context, pod *corev1.Pod) (ippool.Grant, error) {
	status := a.state.get()
	store, err := lease.Open(a.Paths.Leases, status.Config.CoolDown)
	if err != nil {
		return ippool.Grant{}, err
	}
	namespace, found := a.view.Namespaces.Get("", pod.Namespace)
	if !found {
		namespace = &corev1.Namespace{}
	}
	grant, err := a.blocks.Request(ctx, store, segments(status.Interfaces), pod.ObjectMeta, namespace.ObjectMeta)
	if err != nil || grant.Pool == "" {
		return grant, err
	}
	state, err := store.State()
	if err != nil {
		return grant, err
	}
	for deadline := time.Now().Add(routePatience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		missing := false
		routes := map[netip.Prefix]bool{}
		for _, r := range a.state.get().Plan.Routes {
			routes[r.To] = true
		}
		for _, p := range state.Pools {
			for _, r := range slices.Concat(p.Ranges, p.Fixed) {
				missing = missing || p.Name == grant.Pool && !routes[r]
			}
		}
		if !missing {
			break
		}
		a.Wake()
	}
	return grant, nil
}
