package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// refusals tracks the blocks that nodes do not use, and what was reported about them. Every agent sees them; the controller
// reports them, because only one leads.
type refusals struct {
	since map[string]time.Time // by block, as text
	told  map[string]bool
	next  map[string]time.Time // by node: earliest time of the next event
}

const (
	// settled is how long a block has to be refused before that is reported: pools and blocks have separate watches, so a
	// block may arrive before its pool.
	settled = 5 * time.Second
	// refusalPause is the minimal interval between two events for one node's blocks, since invalid blocks may be created in
	// any number.
	refusalPause = time.Minute
)

// keepPools protects IPPools that have blocks from deletion, and reports blocks that nodes do not use.
func (a *allocator) keepPools() {
	objects := ippool.Objects{Pools: a.view.PodPools.All(), Blocks: a.view.Blocks.All(), Nodes: a.view.Nodes.All(), Services: a.view.ServiceCIDRs.All(), AddressPools: a.view.AddressPools.All()}
	f := ippool.Read(objects)
	for _, p := range f.Pools {
		object := "ippool/" + p.Name
		want, differs := f.Finalizers(p)
		if !differs {
			a.writes.Withdraw(object)
			continue
		}
		a.writes.Publish(object, func(ctx context.Context) error {
			finalizers := want
			if p.Deleting { // irrevocably: the watch may not have delivered all blocks yet
				now, err := kube.List(ctx, a.Client, kube.IPBlocks, kube.Selection{})
				if err != nil {
					return err
				}
				var differs bool
				if finalizers, differs = f.WithBlocks(now).Finalizers(p); !differs {
					return nil
				}
			}
			if err := a.Client.SetPoolFinalizers(ctx, p.Object(), finalizers); err != nil && !apierrors.IsConflict(err) {
				return err
			}
			return nil
		})
	}
	for _, e := range a.refusals.tell(f.Refused, time.Now()) {
		a.events.Record(e)
	}
}

// wait reports whether there are blocks that remain to be reported.
func (r *refusals) wait() bool { return len(r.told) < len(r.since) }

// tell returns the events for blocks that have been refused for a while and were not reported yet: one for each node, on
// its first block. (The agents report blocks of their own nodes on the Node.)
func (r *refusals) tell(refused []ippool.RefusedBlock, now time.Time) (events []kube.Event) {
	if r.since == nil {
		r.since, r.told, r.next = map[string]time.Time{}, map[string]bool{}, map[string]time.Time{}
	}
	present := map[string]bool{}
	fresh := map[string][]ippool.RefusedBlock{}
	for _, b := range refused {
		key := string(b.UID) + " " + b.Text
		present[key] = true
		if _, known := r.since[key]; !known {
			r.since[key] = now
		}
		if !r.told[key] && now.Sub(r.since[key]) >= settled && !now.Before(r.next[b.Node]) {
			fresh[b.Node] = append(fresh[b.Node], b)
			r.told[key] = true
		}
	}
	for key := range r.since {
		if !present[key] {
			delete(r.since, key)
			delete(r.told, key)
		}
	}
	for node, when := range r.next {
		if !now.Before(when) {
			delete(r.next, node)
		}
	}
	nodes := make([]string, 0, len(fresh))
	for node := range fresh {
		nodes = append(nodes, node)
	}
	slices.Sort(nodes)
	for _, node := range nodes {
		r.next[node] = now.Add(refusalPause)
		const most = 3
		var texts []string
		for _, b := range fresh[node][:min(len(fresh[node]), most)] {
			texts = append(texts, b.String())
		}
		if more := len(fresh[node]) - most; more > 0 {
			texts = append(texts, fmt.Sprintf("and %d more", more))
		}
		events = append(events, kube.Event{Object: kube.Reference(&v1alpha1.IPBlock{ObjectMeta: metav1.ObjectMeta{Name: fresh[node][0].Name, UID: fresh[node][0].UID}}), Warning: true, Reason: "BlockRefused", Message: strings.Join(texts, "; ")})
	}
	return events
}
