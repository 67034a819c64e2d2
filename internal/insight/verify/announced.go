package verify

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Announced says how packets for a Service's address reach nodes, according to the nodes' agents.
type Announced struct {
	Address string `json:"address,omitempty"` // empty if the Service waits for a load balancer's address
	Pool    string `json:"pool,omitempty"`
	// Answered lists the nodes that answer ARP or Neighbour Discovery for it. It should be one.
	Answered []string     `json:"answered,omitempty"`
	Routers  []ToldRouter `json:"routers,omitempty"`
	// Why lists the reasons why it is not announced as it should be.
	Why []string `json:"why,omitempty"`
}

// ToldRouter is a BGPPeer with the nodes that announce an address to it.
type ToldRouter struct {
	Peer  string   `json:"peer"`
	Nodes []string `json:"nodes,omitempty"`
	// Silent maps nodes that should announce it to the reasons why they do not.
	Silent map[string]string `json:"silent,omitempty"`
}

func (r ToldRouter) String() string {
	text := r.Peer + " by "
	if len(r.Nodes) == 0 {
		text += "none"
	}
	text += strings.Join(r.Nodes, ",")
	for _, n := range slices.Sorted(maps.Keys(r.Silent)) {
		text += fmt.Sprintf(", not %s: %s", n, r.Silent[n])
	}
	return text
}

// balancersVerb is the agent's command that prints what it does about load balancers' addresses.
const balancersVerb = "balancers"

// announcements asks the agents which nodes announce the addresses of a Service.
func announcements(ctx context.Context, client *kube.Client, svc *corev1.Service, c Cluster, pools vip.Pools, agents map[string]*corev1.Pod) []Announced {
	namespaces := map[string]labels.Set{}
	for _, n := range c.Namespaces {
		namespaces[n.Name] = n.Labels
	}
	var assigned vip.Assignment
	for _, a := range pools.Assign(c.Services, namespaces) {
		if a.Service == (service.Name{Namespace: svc.Namespace, Name: svc.Name}) {
			assigned = a
		}
	}
	accounts, failed := ask[answer.Balancers](ctx, client, agents, balancersVerb)
	return announced(svc, assigned, pools, accounts, failed)
}

// announced combines the agents' answers about a Service's addresses. assigned is what the controller should assign to the
// Service, accounts holds the answer of each node's agent, and failed the errors of agents that did not answer.
func announced(svc *corev1.Service, assigned vip.Assignment, pools vip.Pools, accounts map[string]answer.Balancers, failed map[string]error) []Announced {
	all := balanced(svc, assigned, pools, accounts, failed)
	for _, ip := range svc.Spec.ExternalIPs {
		addr, err := inet.ParseAddr(ip)
		if err != nil || slices.ContainsFunc(all, func(x Announced) bool { return x.Address == addr.String() }) {
			continue
		}
		if pool := pools.Of(addr); pool != nil { // other addresses are not the cluster's to announce
			x := announcedBy(addr, svc, accounts, failed)
			if x.Pool = pool.Name; !decided(addr, accounts) && len(accounts) > 0 {
				x.Why = []string{fmt.Sprintf("no agent announces it: it is not served, or AddressPool %s is not for this Service", pool.Name)}
			}
			all = append(all, x)
		}
	}
	for _, ip := range svc.Spec.ClusterIPs {
		addr, err := inet.ParseAddr(ip)
		if err != nil {
			continue
		}
		if x := announcedBy(addr, svc, accounts, failed); len(x.Routers) > 0 { // most clusters do not announce ClusterIPs
			x.Why = nil
			all = append(all, x)
		}
	}
	return all
}

// decided reports whether an agent has a verdict on an address.
func decided(addr netip.Addr, accounts map[string]answer.Balancers) bool {
	for _, a := range accounts {
		if slices.ContainsFunc(a.Addresses, func(v vip.Verdict) bool { return v.Address == addr }) {
			return true
		}
	}
	return false
}

// balanced returns Announced for a load balancer's addresses.
func balanced(svc *corev1.Service, assigned vip.Assignment, pools vip.Pools, accounts map[string]answer.Balancers, failed map[string]error) []Announced {
	if svc.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var all []Announced
	var have []netip.Addr
	for _, in := range svc.Status.LoadBalancer.Ingress {
		addr, err := netip.ParseAddr(in.IP)
		if err != nil {
			all = append(all, Announced{Address: in.Hostname, Why: []string{"it is another controller's"}})
			continue
		}
		have = append(have, addr)
		if pool := pools.Of(addr); pool == nil {
			all = append(all, Announced{Address: in.IP, Why: []string{"it is in no AddressPool, so no agent announces it: it is another controller's, or the pool is gone"}})
		} else {
			x := announcedBy(addr, svc, accounts, failed)
			x.Pool = pool.Name
			all = append(all, x)
		}
	}
	waits := Announced{}
	switch {
	case !vip.Ours(svc) && svc.DeletionTimestamp != nil:
		waits.Why = []string{"the Service is being deleted"}
	case !vip.Ours(svc):
		waits.Why = []string{fmt.Sprintf("its loadBalancerClass %s is another controller's", *svc.Spec.LoadBalancerClass)}
	case assigned.Text != "":
		waits.Why = []string{assigned.Reason + ": " + assigned.Text}
	default:
		for _, addr := range assigned.Addresses {
			if !slices.Contains(have, addr) {
				waits.Why = append(waits.Why, fmt.Sprintf("it should have %s, but the controller has not written that: kubectl -n fathom-system logs deploy/fathom-controller", addr))
			}
		}
	}
	if len(all) == 0 || vip.Ours(svc) && len(waits.Why) > 0 {
		all = append(all, waits)
	}
	return all
}

// announcedBy combines the agents' answers about one address.
func announcedBy(addr netip.Addr, svc *corev1.Service, accounts map[string]answer.Balancers, failed map[string]error) Announced {
	x := Announced{Address: addr.String()}
	v := views{routers: map[string]*ToldRouter{}, announcers: map[string]bool{}, eligible: map[string]bool{}}
	for _, node := range slices.Sorted(maps.Keys(accounts)) {
		v.hear(addr, node, accounts[node], &x)
	}
	for _, peer := range slices.Sorted(maps.Keys(v.routers)) {
		x.Routers = append(x.Routers, *v.routers[peer])
	}
	if len(x.Answered) > 1 {
		x.Why = append(x.Why, "several nodes answer: their agents do not reach each other (port 10472, TCP and UDP), or have not yet")
	}
	told := slices.ContainsFunc(x.Routers, func(r ToldRouter) bool { return len(r.Nodes) > 0 })
	if len(x.Answered) == 0 && !told {
		x.Why = append(x.Why, v.why(svc, accounts, failed)...)
	}
	return x
}

// views are the agents' views of an address.
type views struct {
	decided    bool // by any agent
	near       []string
	announcers map[string]bool
	eligible   map[string]bool
	routers    map[string]*ToldRouter
}

// hear adds the answer of one node's agent.
func (v *views) hear(addr netip.Addr, node string, a answer.Balancers, x *Announced) {
	for _, r := range a.Routers {
		if !slices.Contains(r.Selected, addr) {
			continue
		}
		told := v.routers[r.Peer]
		if told == nil {
			told = &ToldRouter{Peer: r.Peer, Silent: map[string]string{}}
			v.routers[r.Peer] = told
		}
		if slices.Contains(r.Told, addr) {
			told.Nodes = append(told.Nodes, node)
		} else {
			told.Silent[node] = strings.TrimSpace(r.State + " " + r.Message)
		}
	}
	i := slices.IndexFunc(a.Addresses, func(v vip.Verdict) bool { return v.Address == addr })
	if i < 0 { // a ClusterIP, which is announced to routers only
		return
	}
	verdict := a.Addresses[i]
	v.decided = true
	for _, n := range verdict.Eligible {
		v.eligible[n] = true
	}
	if len(verdict.Devices) > 0 {
		v.near = append(v.near, node)
	}
	if verdict.Announcer != "" {
		v.announcers[verdict.Announcer] = true
	}
	if verdict.Answers && a.Problem == "" {
		x.Answered = append(x.Answered, node)
	}
	if verdict.StandIn == node {
		x.Why = append(x.Why, fmt.Sprintf("the agent of %s is away: %s announces for it that packets go to it", verdict.Announcer, node))
	}
}

// why returns the reasons why no node announces an address.
func (v *views) why(svc *corev1.Service, accounts map[string]answer.Balancers, failed map[string]error) []string {
	local := svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	switch {
	case len(accounts)+len(failed) == 0:
		return []string{"no agent of Fathom's network runs in the cluster"}
	case !v.decided:
		why := []string{"no agent that answered has a verdict on it"}
		for _, n := range slices.Sorted(maps.Keys(accounts)) {
			if w := accounts[n].Waiting; w != "" {
				why = append(why, n+" waits: "+w)
			}
		}
		return why
	case len(v.eligible) == 0 && local:
		return []string{"externalTrafficPolicy is Local, and no living node has a ready endpoint"}
	case len(v.eligible) == 0:
		return []string{"the agents consider no node alive"}
	}
	var why []string
	switch {
	case len(v.near) == 0:
		why = append(why, "no node answers for it: no node is on a network that contains it")
	case len(v.announcers) == 0:
		why = append(why, fmt.Sprintf("no node answers for it: none of the nodes on its network (%s) may take its packets, only %s",
			strings.Join(v.near, ", "), strings.Join(slices.Sorted(maps.Keys(v.eligible)), ", ")))
	}
	for _, n := range slices.Sorted(maps.Keys(v.announcers)) {
		account, heard := accounts[n]
		text := "has not started to"
		switch {
		case failed[n] != nil:
			text = "cannot be reached: " + answer.OneLine(failed[n])
		case !heard:
			text = "has no running agent"
		case account.Problem != "":
			text = "cannot: " + account.Problem
		}
		why = append(why, fmt.Sprintf("%s should answer for it, but %s", n, text))
	}
	if len(v.routers) == 0 {
		why = append(why, "it is announced to no router: no BGPPeer that advertises it selects a node that may take its packets")
	}
	return why
}
