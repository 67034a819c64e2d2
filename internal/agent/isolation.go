package agent

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/agent/policies"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/lease"
)

func (a *Agent) newPolicies() *policies.Keeper {
	k := policies.New(policies.Options{Node: a.Node, Client: a.Client, Log: a.Log, Changed: a.Wake, Resync: a.Resync, Events: a.events, NetNS: a.Paths.NetNS, Closed: a.closedMark()})
	a.metrics.registry.MustRegister(prometheus.WrapCollectorWith(prometheus.Labels{"node": a.Node}, k))
	return k
}

// closedMark is the path of the file by which the plugin knows that the kernel holds policies.
func (a *Agent) closedMark() string {
	return filepath.Join(filepath.Dir(a.Paths.Socket), conflist.ClosedMark)
}

// keepPolicies tells the keeper of policies which addresses are those of the node's pods. What is wrong with a policy is its author's
// matter, and a problem of every node that has one.
func (a *Agent) keepPolicies(_ context.Context, p *pass) outcome {
	a.policies.SetEstablished(cmp.Or(a.PolicyEstablished, a.config.PolicyEstablished))
	a.policies.SetRanges(slices.Concat(p.facts.Own.PodCIDRs, p.facts.Own.Blocks))
	return outcome{problems: a.policies.Problems()}
}

func (a *Agent) awaitPolicies(_ context.Context, p *pass) outcome {
	known, problem := a.policies.Status()
	switch {
	case !known && problem == "":
		p.status.Reason = "NetworkPolicies: the API server has not told this node of them yet"
		return outcome{ends: true}
	case !known:
		p.status.Reason = "NetworkPolicies: " + problem
		return outcome{ends: true}
	case problem != "":
		return outcome{problems: []string{"NetworkPolicies: " + problem}}
	}
	return outcome{}
}

// policyLeases are leases as the keeper of policies takes them.
func policyLeases(leases []lease.Lease) (list []policies.Lease) {
	for _, l := range leases {
		list = append(list, policies.Lease{Pod: service.Name{Namespace: l.PodNamespace, Name: l.PodName}, UID: l.PodUID, Addrs: l.Addresses})
	}
	return list
}

// answerPolicies answers the plugin, which has attached a pod, when the pod's policies are in the kernel. A static pod that the API server
// does not know is not found: if there are policies it stays closed until it is known.
func (a *Agent) answerPolicies(w http.ResponseWriter, r *http.Request) {
	if a.view == nil { // Clean runs
		http.Error(w, "the network is being uninstalled", http.StatusServiceUnavailable)
		return
	}
	l := policies.Lease{Pod: service.Name{Namespace: r.PathValue("namespace"), Name: r.PathValue("name")}, UID: r.URL.Query().Get("uid")}
	for _, s := range r.URL.Query()["address"] {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			http.Error(w, fmt.Sprintf("address %q: %v", s, err), http.StatusBadRequest)
			return
		}
		l.Addrs = append(l.Addrs, addr)
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerPatience)
	defer cancel()
	if a.view.Synced() { // else there is no use in waiting for the pod
		if pod, err := a.awaitPod(ctx, l.Pod.Namespace, l.Pod.Name, l.UID); err == nil && pod == nil {
			http.Error(w, "no such pod on this node", http.StatusNotFound)
			return
		}
	}
	err := a.policies.Await(ctx, l)
	if known, _ := a.policies.Status(); err != nil && !known {
		// As if no agent ran: what the kernel holds from before keeps the pod closed.
		http.Error(w, answer.OneLine(err), http.StatusNotFound)
		return
	}
	if err != nil {
		http.Error(w, answer.OneLine(err), http.StatusServiceUnavailable)
		return
	}
	reply(w, struct{}{}, nil)
}
