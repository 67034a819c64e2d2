// Package announcing has the network around the cluster know by which node an address is reached: a node answers for load
// balancers' addresses on its segments (Balancer), and tells routers of pods and Services by BGP (BGP).
package announcing

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent/announcing/membership"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// Balancer has the node answer for the load balancers' addresses that are its to answer for: docs/design/load-balancer.md.
// It has a loop of its own: when a node has died there is no time to wait for an API server that may have died with it,
// as a pass of the agent's does.
type Balancer struct {
	node    string
	log     *slog.Logger
	resync  time.Duration
	source  Source
	changed func() // when Routed is something else
	kick    wake.Signal
	speaker *announce.Speaker
	// neighbour is the Ethernet address of another node on a device, if the kernel knows it.
	neighbour func(device string, addr netip.Addr) (net.HardwareAddr, error)
	count     *prometheus.GaugeVec

	mu     sync.Mutex
	place  place
	routed []bgpconf.ServiceAddress
	known  bool // that routed is as it should be
	inner  bool // that ClusterIPs are among what is routed
	told   answer.Balancers
	keyIDs []string // names of the member's keys

	// What follows belongs to the loop.
	member    *membership.Member
	as        membership.Options
	keys      chan foundKeys
	isAsked   bool // for the keys, and answered
	keyAt     time.Time
	joinAt    time.Time
	joining   chan struct{} // closed when the attempt is over; nil before the first
	seen      vip.Facts
	answers   []netip.Addr
	verdicts  []vip.Verdict
	complaint string
}

// Source is what a Balancer learns the cluster from.
type Source interface {
	Nodes() []*corev1.Node
	AddressPools() []*v1alpha1.AddressPool
	LoadBalancers() ([]service.LoadBalanced, bool)
	// TellsClusterIPs reports whether LoadBalancers includes ClusterIPs from now on.
	TellsClusterIPs() bool
	// Keys are those by which agents know each other: the one to encrypt with first.
	Keys(context.Context) ([][]byte, error)
}

// place is where the node is.
type place struct {
	addrs    []netip.Addr // its own
	segments []podnet.Segment
}

// Options are what a Balancer is made of.
type Options struct {
	Node      string
	Log       *slog.Logger
	Resync    time.Duration // how often the keys of the membership are read again
	Namespace *link.Namespace
	Source    Source
	Changed   func() // called when Routed is something else; it must not wait
	Registry  prometheus.Registerer
}

// NewBalancer returns a Balancer that answers for nothing yet.
func NewBalancer(o Options) *Balancer {
	b := &Balancer{
		node: o.Node, log: o.Log, resync: o.Resync, source: o.Source, changed: o.Changed, kick: wake.New(), keys: make(chan foundKeys, 1),
		speaker: announce.New(o.Namespace, o.Log), neighbour: o.Namespace.NeighbourMAC,
		count: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_loadbalancer_addresses", ConstLabels: prometheus.Labels{"node": o.Node},
			Help: "Addresses of load balancers that the node answers for on its segments (l2), and that it tells routers of if they ask for it (routed)."}, []string{"how"}),
	}
	o.Registry.MustRegister(b.count)
	return b
}

// Wake has it look again at what its source says. It does not wait.
func (b *Balancer) Wake() { b.kick.Set() }

// Set passes where the node is, and wakes the loop. It does not wait.
func (b *Balancer) Set(own podnet.Node, interfaces []podnet.Interface) {
	place := place{own.Addrs, podnet.Segments(interfaces)}
	b.mu.Lock()
	b.place = place
	b.mu.Unlock()
	b.kick.Set()
}

// Routed are the addresses of Services that routers may send here, and whether they are known yet: with ClusterIPs, if these
// are asked for.
func (b *Balancer) Routed(clusterIPs bool) ([]bgpconf.ServiceAddress, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.routed, b.known && (b.inner || !clusterIPs)
}

// Run answers until the context ends, and then leaves the membership, so that another node takes over at once.
func (b *Balancer) Run(ctx context.Context) {
	tick := time.NewTicker(joinInterval)
	defer tick.Stop()
	defer func() {
		b.speaker.Close()
		if b.member != nil {
			b.member.Leave()
		}
	}()
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.kick:
		case <-tick.C:
		}
		b.step(ctx)
	}
}

// step works out what the node answers for, and has the kernel and the speaker follow.
func (b *Balancer) step(ctx context.Context) {
	b.mu.Lock()
	place := b.place
	b.mu.Unlock()
	if len(place.addrs) == 0 {
		b.waits("the node's network is not known yet")
		return
	}
	pools := b.source.AddressPools()
	nodes := b.source.Nodes()
	if len(pools) > 0 {
		// A node that has not yet joined the membership would answer for every address.
		if heard := b.keepMember(ctx, place, nodes); !heard && b.answers == nil {
			b.waits("it was not tried yet to hear of the other nodes' agents")
			return
		}
	}
	inner := b.source.TellsClusterIPs()
	balancers, known := b.source.LoadBalancers()
	if !known && len(pools) > 0 {
		b.waits("Services are not known yet")
		return // what is answered stays so
	}
	f := vip.Facts{Node: b.node, Balancers: balancers, Segments: place.segments, Pools: vip.Read(vip.Objects{Pools: pools})}
	for _, n := range nodes {
		if _, hasAgent := n.Annotations[netfacts.ModeAnnotation]; hasAgent || n.Name == b.node {
			f.Nodes = append(f.Nodes, b.readNode(n))
		}
	}
	slices.SortFunc(f.Nodes, func(a, b vip.Node) int { return strings.Compare(a.Name, b.Name) })
	if b.answers == nil || inner != b.inner || !reflect.DeepEqual(f, b.seen) {
		verdicts := f.Judge()
		answers, routed := vip.Answered(verdicts), toRouters(f, verdicts)
		b.tell(answers)
		b.seen, b.answers, b.verdicts = f, answers, verdicts
		b.mu.Lock()
		differs := !b.known || inner != b.inner || !slices.EqualFunc(b.routed, routed, bgpconf.ServiceAddress.Like)
		b.routed, b.known, b.inner = routed, true, inner
		b.mu.Unlock()
		b.count.WithLabelValues("l2").Set(float64(len(answers)))
		b.count.WithLabelValues("routed").Set(float64(len(routed)))
		if differs {
			b.changed()
		}
	}
	answers, err := b.standIns(f)
	_, failed := b.speaker.Set(append(answers, announce.Own(b.answers)...), place.segments)
	complaint := ""
	if err := errors.Join(err, failed); err != nil {
		complaint = answer.OneLine(err)
	}
	if complaint != "" && complaint != b.complaint {
		b.log.Warn("addresses of load balancers are not answered for", "error", complaint)
	}
	b.complaint = complaint
	b.mu.Lock()
	b.told = answer.Balancers{Addresses: b.verdicts, Problem: complaint, Segments: f.Segments}
	for _, n := range f.Nodes {
		if n.Alive {
			b.told.Alive = append(b.told.Alive, n.Name)
		}
		if n.Away {
			b.told.Away = append(b.told.Away, n.Name)
		}
	}
	b.mu.Unlock()
}

// waits records why nothing is decided. What was decided before stays.
func (b *Balancer) waits(why string) {
	b.mu.Lock()
	b.told.Waiting = why
	b.mu.Unlock()
}

// Account returns what the node does about load balancers' addresses, and what it expects other nodes to do.
func (b *Balancer) Account() answer.Balancers {
	b.mu.Lock()
	defer b.mu.Unlock()
	account := b.told
	account.Keys = b.keyIDs
	return account
}

// tell logs which addresses are new and which are gone.
func (b *Balancer) tell(now []netip.Addr) {
	for _, a := range now {
		if !slices.Contains(b.answers, a) {
			b.log.Info("answering for an address of a load balancer", "address", a)
		}
	}
	for _, a := range b.answers {
		if !slices.Contains(now, a) {
			b.log.Info("no longer answering for an address of a load balancer", "address", a)
		}
	}
}

// readNode says what is known of a node: what the agents know of each other before what its kubelet last said.
func (b *Balancer) readNode(n *corev1.Node) vip.Node {
	_, excluded := n.Labels[vip.Exclude]
	read := vip.Node{Name: n.Name, Alive: apinode.Ready(n), Excluded: excluded, Addrs: svcfacts.Node(n).Addrs}
	if b.member != nil {
		switch b.member.State(n.Name) {
		case membership.Alive:
			read.Alive = true
		case membership.Away:
			read.Alive, read.Away = true, true
		case membership.Dead:
			read.Alive = false
		case membership.Unknown:
		}
	}
	return read
}
