package agent

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent/bgp"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/routeradv"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// announcer has routers know what is behind the node: docs/design/bgp.md. It belongs to the loop.
type announcer struct {
	speaker *bgp.Speaker
	routers *routeradv.Listener
	// aggregatesNothing says that the kernel was told to refuse nothing of aggregates.
	aggregatesNothing bool
	up                map[string]bool // by peer, as it was told last
	sessions          *prometheus.GaugeVec
	prefixes          *prometheus.GaugeVec

	mu      sync.Mutex
	told    []answer.Router // what routers are
	account answer.BGP
	secrets map[string]secret
}

// secret is what was read of one, and when it was last asked for.
type secret struct {
	data  map[string][]byte
	err   error
	at    time.Time
	known bool // that it was answered, or that the API server had its time to
}

func (a *Agent) newAnnouncer(node *link.Namespace) *announcer {
	labels := prometheus.Labels{"node": a.Node}
	b := &announcer{
		speaker: bgp.New(bgp.Options{Log: a.Log, Changed: a.Wake}), routers: routeradv.New(node, a.Log, a.Wake),
		secrets: map[string]secret{}, up: map[string]bool{},
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_bgp_session_up", ConstLabels: labels,
			Help: "Whether the BGP session with a peer is established."}, []string{"peer"}),
		prefixes: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_bgp_prefixes_advertised", ConstLabels: labels,
			Help: "Prefixes that a peer is told at present."}, []string{"peer"}),
	}
	a.metrics.registry.MustRegister(b.sessions, b.prefixes)
	return b
}

// announce has the node's routers told of its pods, and the cluster of the sessions. It comes after the kernel: a
// router is told of nothing that the node does not carry yet, and a speaker that comes back after a restart may say
// that packets were forwarded all the while.
func (a *Agent) announce(ctx context.Context, own podnet.Node, interfaces []podnet.Interface) []string {
	if !a.view.BGPPeers.Listed() {
		return nil // no CRD, or not heard of yet: what is announced stays
	}
	peers := a.view.BGPPeers.All()
	addresses, known := a.lb.Routed(a.wantsClusterIPs())
	if !known {
		return nil
	}
	b := a.bgp
	node := bgpconf.Node{Name: a.Node, Addrs: own.Addrs, PodCIDRs: slices.Concat(own.PodCIDRs, own.Blocks),
		ServiceAddresses: addresses}
	for _, i := range interfaces {
		node.Links = append(node.Links, bgpconf.Link{Device: i.Name, Addrs: i.Addrs})
	}
	nodes := a.view.Nodes.All()
	for _, n := range nodes {
		if n.Name == a.Node {
			node.Labels = n.Labels
		}
	}
	b.routers.Set(bgpconf.Interfaces(peers, node.Labels))
	heard := b.routers.Heard()
	node.Heard = map[string]bgpconf.Heard{}
	for device, h := range heard {
		node.Heard[device] = bgpconf.Heard{Router: h.Router, Other: h.Other, Problem: h.Problem}
	}
	waits := false
	want, found := bgpconf.Read(peers, node, func(name string) (map[string][]byte, error) {
		s := a.secret(ctx, name)
		waits = waits || !s.known
		return s.data, s.err
	})
	if waits {
		return nil // a peer without its password would be told that it is over; the answer wakes the loop
	}
	var problems []string
	if err := a.refuseAggregates(want.Aggregates()); err != nil {
		problems = append(problems, err.Error())
	}
	b.speaker.Set(ctx, want)
	sessions := b.speaker.Sessions()
	for _, p := range found {
		i := slices.IndexFunc(peers, func(peer *v1alpha1.BGPPeer) bool { return peer.Name == p.Peer })
		if p.Waits && time.Since(heard[peers[i].Spec.Interface].Since) < hearing {
			continue // no problem yet
		}
		problems = append(problems, p.String())
	}
	a.tellSessions(peers, sessions)
	b.note(a.Node, want, peers, sessions, found)
	b.keep(node, want, found)
	for _, p := range peers {
		a.publishSession(p, nodes, entry(p, a.Node, sessions, found))
	}
	return problems
}

// refuseAggregates has the node refuse what routers send for addresses of these prefixes that nobody has, before they are told
// to send it.
func (a *Agent) refuseAggregates(all []netip.Prefix) error {
	if len(all) == 0 {
		if a.bgp.aggregatesNothing { // a transaction has all tables read again
			return nil
		}
		err := a.rules.Delete(service.AggregatesTable)
		a.bgp.aggregatesNothing = err == nil
		return err
	}
	a.bgp.aggregatesNothing = false
	if _, err := a.rules.SetAggregates(all); err != nil {
		return fmt.Errorf("what is for nobody in announced aggregates goes back to the routers: %w", err)
	}
	return nil
}

// hearing is how long a router has to advertise itself before it is a problem that it does not.
const hearing = 10 * time.Second

// wantsClusterIPs says whether a router of this node's is to be told of ClusterIPs.
func (a *Agent) wantsClusterIPs() bool {
	peers := a.view.BGPPeers.All()
	node, _ := a.view.Node(a.Node)
	return slices.ContainsFunc(peers, func(p *v1alpha1.BGPPeer) bool {
		selected, err := bgpconf.Selects(p, node.Labels)
		return err == nil && selected && bgpconf.ForServices(p, v1alpha1.BGPClusterIP)
	})
}

// note keeps what routers are told of Services' addresses, for who asks.
func (b *announcer) note(node string, want bgpconf.Speaker, peers []*v1alpha1.BGPPeer, sessions []bgp.Session, found []bgpconf.Problem) {
	var routers []answer.Router
	for _, p := range peers {
		e := entry(p, node, sessions, found)
		if e == nil || !bgpconf.ForServices(p, v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPExternalIP, v1alpha1.BGPClusterIP) {
			continue
		}
		r := answer.Router{Peer: p.Name, State: e.State, Message: e.Message}
		if i := slices.IndexFunc(want.Peers, func(w bgpconf.Peer) bool { return w.Name == p.Name }); i >= 0 {
			for _, route := range want.Peers[i].Routes {
				r.Selected = append(r.Selected, route.Addrs...)
			}
		}
		if e.State == string(bgp.Established) {
			r.Told = r.Selected
		}
		routers = append(routers, r)
	}
	slices.SortFunc(routers, func(a, b answer.Router) int { return cmp.Compare(a.Peer, b.Peer) })
	b.mu.Lock()
	b.told = routers
	b.mu.Unlock()
}

// keep keeps what was decided, and by what, for who asks.
func (b *announcer) keep(node bgpconf.Node, want bgpconf.Speaker, found []bgpconf.Problem) {
	account := answer.BGP{Decided: true, Links: node.Links, Heard: node.Heard, ServiceAddresses: node.ServiceAddresses, Refused: map[string]string{}}
	for _, p := range found {
		if p.Refused {
			account.Refused[p.Peer] = p.Text
		}
	}
	for _, p := range want.Peers {
		account.Sessions = append(account.Sessions, answer.BGPSession{Peer: p.Name, Told: p.Routes})
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.account = account
}

// Account is what there is to say of the sessions now.
func (b *announcer) Account() (answer.BGP, error) {
	b.mu.Lock()
	account := b.account
	b.mu.Unlock()
	told := map[string][]bgpconf.Route{}
	for _, s := range account.Sessions {
		told[s.Peer] = s.Told
	}
	account.Sessions = nil
	for _, s := range b.speaker.Sessions() {
		account.Sessions = append(account.Sessions, answer.BGPSession{Peer: s.Peer, Address: s.Address, State: string(s.State), Reason: s.Reason, Told: told[s.Peer]})
	}
	rules, err := ruleset.Open(link.OwnNetNS) // the loop's is for the loop alone
	if err != nil {
		return account, err
	}
	defer rules.Close()
	account.Aggregates, _, err = rules.Aggregates()
	return account, err
}

// Routers are what routers are told of Services' addresses.
func (b *announcer) Routers() []answer.Router {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.told
}

// secret is what is known of a Secret, which is read once in a resync, beside the loop. Agents have no right to watch
// Secrets, for that is one to list them.
func (a *Agent) secret(ctx context.Context, name string) secret {
	b := a.bgp
	b.mu.Lock()
	defer b.mu.Unlock()
	have := b.secrets[name]
	if !have.at.IsZero() && time.Since(have.at) < max(a.Resync, apiPatience) {
		return have
	}
	have.at = time.Now()
	b.secrets[name] = have
	go func() {
		ctx, cancel := context.WithTimeout(ctx, apiPatience)
		defer cancel()
		data, err := a.Client.Secret(ctx, netconf.Namespace, name)
		b.mu.Lock()
		defer b.mu.Unlock()
		was := b.secrets[name]
		if err != nil && !apierrors.IsNotFound(err) && was.known && was.err == nil {
			return // a server that does not answer is no reason to end a session
		}
		b.secrets[name] = secret{data, err, was.at, true}
		if !was.known || !reflect.DeepEqual(data, was.data) || (err == nil) != (was.err == nil) {
			a.Wake()
		}
	}()
	return have
}

// tellSessions makes an event of each session that has come up or gone, and sets the metrics.
func (a *Agent) tellSessions(peers []*v1alpha1.BGPPeer, sessions []bgp.Session) {
	b := a.bgp
	b.sessions.Reset()
	b.prefixes.Reset()
	up := map[string]bool{}
	for _, s := range sessions {
		up[s.Peer] = s.State == bgp.Established
		value := 0.0
		if up[s.Peer] {
			value = 1
		}
		b.sessions.WithLabelValues(s.Peer).Set(value)
		b.prefixes.WithLabelValues(s.Peer).Set(float64(s.Routes))
		if up[s.Peer] == b.up[s.Peer] {
			continue
		}
		i := slices.IndexFunc(peers, func(p *v1alpha1.BGPPeer) bool { return p.Name == s.Peer })
		if i < 0 {
			continue
		}
		e := kube.Event{Object: kube.BGPPeerReference(peers[i]), Reason: "SessionUp", Message: fmt.Sprintf("node %s: %d prefixes are announced to %s", a.Node, s.Routes, s.Address)}
		if !up[s.Peer] {
			e.Warning, e.Reason, e.Message = true, "SessionDown", fmt.Sprintf("node %s: the session with %s is %s: %s", a.Node, s.Address, s.State, cmp.Or(s.Reason, "no reason was given"))
		}
		a.events.Record(e)
	}
	b.up = up
}

// maxTold is how many nodes tell of their sessions in a BGPPeer. Each watches the object that all write into: that
// is a hundred times a hundred messages when they come up, and would be a million with a thousand.
const maxTold = 100

// entry is what a node says in the status of a peer, or nil if that is nothing.
func entry(p *v1alpha1.BGPPeer, node string, sessions []bgp.Session, problems []bgpconf.Problem) *v1alpha1.BGPSession {
	for _, s := range sessions {
		if s.Peer == p.Name {
			e := &v1alpha1.BGPSession{Node: node, State: string(s.State), Since: metav1.NewTime(s.Since.Truncate(time.Second)), Message: kube.Clip(s.Reason), Prefixes: int32(s.Routes)}
			if s.State != bgp.Established {
				// It tries again and again: where it is between two attempts is of no interest to the cluster.
				e.State = string(bgp.Active)
			}
			return e
		}
	}
	for _, problem := range problems {
		if problem.Peer == p.Name && problem.Refused {
			// Since the object is as it is.
			e := &v1alpha1.BGPSession{Node: node, State: "Refused", Since: p.CreationTimestamp, Message: kube.Clip(problem.Text)}
			if problem.Waits {
				e.State = string(bgp.Active)
			}
			if have := bgpconf.SessionOf(p, node); have != nil && have.State == e.State {
				e.Since = have.Since
			}
			return e
		}
	}
	return nil
}

// publishSession has the node's entry written, if the API has another. It is all of the status that an agent may write:
// entries of nodes that the cluster no longer has are the controller's to take away.
func (a *Agent) publishSession(p *v1alpha1.BGPPeer, nodes []*corev1.Node, want *v1alpha1.BGPSession) {
	selected := 0
	for _, n := range nodes {
		if ok, err := bgpconf.Selects(p, n.Labels); ok && err == nil {
			selected++
		}
	}
	if selected > maxTold {
		want = nil
	}
	have := bgpconf.SessionOf(p, a.Node)
	same := have == nil && want == nil || have != nil && want != nil && have.State == want.State && have.Message == want.Message &&
		have.Prefixes == want.Prefixes && have.Since.Equal(&want.Since)
	object := "bgppeer/" + p.Name
	if same {
		a.writes.Withdraw(object)
		return
	}
	a.writes.Publish(object, func(ctx context.Context) error {
		return a.Client.PublishBGPSession(ctx, p.Name, a.Node, want)
	})
}
