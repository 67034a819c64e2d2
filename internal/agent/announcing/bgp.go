package announcing

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
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

// BGP has routers know what is behind the node: docs/design/bgp.md. It belongs to the agent's loop, but for Account and Routers.
type BGP struct {
	BGPOptions
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

// BGPOptions are what a BGP is made of.
type BGPOptions struct {
	Node      string
	Log       *slog.Logger
	Resync    time.Duration // how often Secrets are read again
	Namespace *link.Namespace
	Rules     *ruleset.Ruleset // the loop's, for what refuses aggregates
	API       BGPAPI
	Events    *kube.Recorder
	Writes    *kube.Publisher
	Changed   func() // called when a pass would find something else; it must not wait
	Registry  prometheus.Registerer
}

// BGPAPI is what BGP needs of the API server.
type BGPAPI interface {
	Secret(ctx context.Context, namespace, name string) (map[string][]byte, error)
	PublishBGPSession(ctx context.Context, peer, node string, want *v1alpha1.BGPSession) error
}

// NewBGP returns a BGP that tells nothing yet.
func NewBGP(o BGPOptions) *BGP {
	labels := prometheus.Labels{"node": o.Node}
	b := &BGP{
		BGPOptions: o,
		speaker:    bgp.New(bgp.Options{Log: o.Log, Changed: o.Changed}), routers: routeradv.New(o.Namespace, o.Log, o.Changed),
		secrets: map[string]secret{}, up: map[string]bool{},
		sessions: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_bgp_session_up", ConstLabels: labels,
			Help: "Whether the BGP session with a peer is established."}, []string{"peer"}),
		prefixes: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_bgp_prefixes_advertised", ConstLabels: labels,
			Help: "Prefixes that a peer is told at present."}, []string{"peer"}),
	}
	o.Registry.MustRegister(b.sessions, b.prefixes)
	return b
}

// Close ends the sessions without a word, so that routers keep the routes.
func (b *BGP) Close() {
	b.speaker.Leave()
	b.routers.Close()
}

// Known is what a pass knows of what is to be announced.
type Known struct {
	Peers      []*v1alpha1.BGPPeer
	Nodes      []*corev1.Node
	Own        podnet.Node
	Interfaces []podnet.Interface
	Addresses  []bgpconf.ServiceAddress // of Services, that routers may send here
}

// Announce has the node's routers told of its pods, and the cluster of the sessions. It returns what is in the way.
func (b *BGP) Announce(ctx context.Context, k Known) []string {
	own, peers, nodes := k.Own, k.Peers, k.Nodes
	node := bgpconf.Node{Name: b.Node, Addrs: own.Addrs, PodCIDRs: slices.Concat(own.PodCIDRs, own.Blocks),
		ServiceAddresses: k.Addresses}
	for _, i := range k.Interfaces {
		node.Links = append(node.Links, bgpconf.Link{Device: i.Name, Addrs: i.Addrs})
	}
	for _, n := range nodes {
		if n.Name == b.Node {
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
		s := b.secret(ctx, name)
		waits = waits || !s.known
		return s.data, s.err
	})
	if waits {
		return nil // a peer without its password would be told that it is over; the answer wakes the loop
	}
	var problems []string
	if err := b.refuseAggregates(want.Aggregates()); err != nil {
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
	b.tellSessions(peers, sessions)
	b.note(b.Node, want, peers, sessions, found)
	b.keep(node, want, found)
	for _, p := range peers {
		b.publishSession(p, nodes, entry(p, b.Node, sessions, found))
	}
	return problems
}

// refuseAggregates has the node refuse what routers send for addresses of these prefixes that nobody has, before they are told
// to send it.
func (b *BGP) refuseAggregates(all []netip.Prefix) error {
	if len(all) == 0 {
		if b.aggregatesNothing { // a transaction has all tables read again
			return nil
		}
		err := b.Rules.Delete(service.AggregatesTable)
		b.aggregatesNothing = err == nil
		return err
	}
	b.aggregatesNothing = false
	if _, err := b.Rules.SetAggregates(all); err != nil {
		return fmt.Errorf("what is for nobody in announced aggregates goes back to the routers: %w", err)
	}
	return nil
}

// hearing is how long a router has to advertise itself before it is a problem that it does not.
const hearing = 10 * time.Second

// secret is what is known of a Secret, which is read once in a resync, beside the loop. Agents have no right to watch
// Secrets, for that is one to list them.
func (b *BGP) secret(ctx context.Context, name string) secret {
	b.mu.Lock()
	defer b.mu.Unlock()
	have := b.secrets[name]
	if !have.at.IsZero() && time.Since(have.at) < max(b.Resync, apiPatience) {
		return have
	}
	have.at = time.Now()
	b.secrets[name] = have
	go func() {
		ctx, cancel := context.WithTimeout(ctx, apiPatience)
		defer cancel()
		data, err := b.API.Secret(ctx, netconf.Namespace, name)
		b.mu.Lock()
		defer b.mu.Unlock()
		was := b.secrets[name]
		if err != nil && !apierrors.IsNotFound(err) && was.known && was.err == nil {
			return // a server that does not answer is no reason to end a session
		}
		b.secrets[name] = secret{data, err, was.at, true}
		if !was.known || !reflect.DeepEqual(data, was.data) || (err == nil) != (was.err == nil) {
			b.Changed()
		}
	}()
	return have
}

// apiPatience is how long the API server has to answer about a Secret.
const apiPatience = 2 * time.Second
