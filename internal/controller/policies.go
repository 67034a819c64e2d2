package controller

import (
	"context"
	"maps"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	cnp "github.com/fathom-network/fathom/api/clusternetworkpolicy/v1beta1"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// policyBook is what is to be said of policies: parts of them that nothing can be made of. All agents find the same ones, so the controller, of
// which one leads, says so. Of each policy it keeps that alone.
type policyBook struct {
	mu    sync.Mutex
	notes map[policy.ID]policyNote
	told  map[policy.ID]string
}

// policyNote is what is to be said of one. A NetworkPolicy has no status.
type policyNote struct {
	object    corev1.ObjectReference
	problems  string
	condition *metav1.Condition // that its status is to have, if it has not
}

// watchPolicies begins to read policies.
func watchPolicies(ctx context.Context, c *kube.Client, changed func()) *policyBook {
	b := &policyBook{notes: map[policy.ID]policyNote{}, told: map[policy.ID]string{}}
	kube.Watch(ctx, c, kube.NetworkPolicies, kube.Options[*networkingv1.NetworkPolicy]{Changed: changed,
		Set: func(o *networkingv1.NetworkPolicy) {
			p := policyfacts.NetworkPolicy(o)
			b.set(p, policyNote{object: kube.Reference(o)})
		},
		Deleted: func(n service.Name) { b.remove(policyfacts.ID(n)) }})
	kube.Watch(ctx, c, kube.ClusterNetworkPolicies, kube.Options[*cnp.ClusterNetworkPolicy]{Changed: changed, Optional: true,
		Set: func(o *cnp.ClusterNetworkPolicy) {
			p := policyfacts.ClusterNetworkPolicy(o)
			note := policyNote{object: kube.Reference(o)}
			if condition, differs := policyfacts.Condition(o, p, time.Now()); differs {
				note.condition = &condition
			}
			b.set(p, note)
		},
		Deleted: func(n service.Name) { b.remove(policyfacts.ClusterID(n.Name)) }})
	return b
}

func (b *policyBook) set(p *policy.Policy, n policyNote) {
	n.problems = strings.Join(p.Problems, "; ")
	b.mu.Lock()
	defer b.mu.Unlock()
	if n.problems == "" && n.condition == nil {
		delete(b.notes, p.ID)
		return
	}
	b.notes[p.ID] = n
}

func (b *policyBook) remove(id policy.ID) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.notes, id)
}

// tellPolicies writes conditions that differ, and records an event about a policy of which something new cannot be applied.
func (a *allocator) tellPolicies() {
	a.policies.mu.Lock()
	notes := maps.Clone(a.policies.notes)
	a.policies.mu.Unlock()
	maps.DeleteFunc(a.policies.told, func(id policy.ID, text string) bool { return notes[id].problems != text })
	for id, n := range notes {
		if n.problems != "" && a.policies.told[id] != n.problems {
			a.policies.told[id] = n.problems
			a.events.Record(kube.Event{Object: n.object, Warning: true, Reason: policyfacts.PolicyProblem, Message: n.problems})
		}
		if n.condition == nil {
			continue
		}
		a.writes.Publish(policyWrite(id), func(ctx context.Context) error {
			return a.Client.SetPolicyCondition(ctx, Component, id.Name.Name, *n.condition)
		})
	}
	for id := range a.written {
		if notes[id].condition == nil {
			a.writes.Withdraw(policyWrite(id))
		}
	}
	clear(a.written)
	for id, n := range notes {
		if n.condition != nil {
			a.written[id] = true
		}
	}
}

// policyWrite is a policy's name among the publisher's objects.
func policyWrite(id policy.ID) string { return "policy/" + id.String() }
