package agent

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
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
	"github.com/fathom-network/fathom/internal/agent/membership"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/facts/keyset"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/netfacts"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/facts/svcfacts"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/kernel/announce"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/wake"
)

// balancer has the node answer for the load balancers' addresses that are its to answer for: docs/design/load-balancer.md.
// It has a loop of its own: when a node has died there is no time to wait for an API server that may have died with it,
// as a pass of the agent's does.
type balancer struct {
	node    string
	log     *slog.Logger
	resync  time.Duration
	source  balancerSource
	changed func() // when Routed is something else
	kick    wake.Signal
	speaker *announce.Speaker
	// neighbour is the Ethernet address of another node on a device, if the kernel knows it.
	neighbour func(device string, addr netip.Addr) (net.HardwareAddr, error)
	count     *prometheus.GaugeVec

	mu     sync.Mutex
	place  balancerPlace
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

// balancerSource is whom a balancer asks.
type balancerSource interface {
	Nodes() []*corev1.Node
	AddressPools() []*v1alpha1.AddressPool
	LoadBalancers() ([]service.LoadBalanced, bool)
	// TellsClusterIPs says whether ClusterIPs are among what LoadBalancers tells from now on.
	TellsClusterIPs() bool
	// Keys are those by which agents know each other: the one to encrypt with first.
	Keys(context.Context) ([][]byte, error)
}

// foundKeys is what is known of the keys. Until they are asked for, nothing is.
type foundKeys struct {
	keys [][]byte
	err  error
}

// balancerPlace is where the node is.
type balancerPlace struct {
	addrs    []netip.Addr // its own
	segments []podnet.Segment
}

func (a *Agent) newBalancer(node *link.Namespace) *balancer {
	b := &balancer{
		node: a.Node, log: a.Log, resync: a.Resync, source: agentSource{a}, changed: a.Wake, kick: wake.New(), keys: make(chan foundKeys, 1),
		speaker: announce.New(node, a.Log), neighbour: node.NeighbourMAC,
		count: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "fathom_loadbalancer_addresses", ConstLabels: prometheus.Labels{"node": a.Node},
			Help: "Addresses of load balancers that the node answers for on its segments (l2), and that it tells routers of if they ask for it (routed)."}, []string{"how"}),
	}
	a.metrics.registry.MustRegister(b.count)
	return b
}

// agentSource asks the agent's parts.
type agentSource struct{ a *Agent }

func (s agentSource) Nodes() []*corev1.Node                 { return s.a.view.Nodes.All() }
func (s agentSource) AddressPools() []*v1alpha1.AddressPool { return s.a.view.AddressPools.All() }
func (s agentSource) LoadBalancers() ([]service.LoadBalanced, bool) {
	return s.a.proxy.LoadBalancers()
}

func (s agentSource) TellsClusterIPs() bool { return s.a.proxy.TellsClusterIPs() }

func (s agentSource) Keys(ctx context.Context) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, apiPatience)
	defer cancel()
	data, err := s.a.Client.Secret(ctx, netconf.Namespace, keyset.Secret)
	if err != nil {
		return nil, err
	}
	return keyset.Read(data)
}

// set tells where the node is, and that something may have changed. It does not wait.
func (b *balancer) set(own podnet.Node, interfaces []podnet.Interface) {
	place := balancerPlace{addrs: own.Addrs}
	place.segments = podnet.Segments(interfaces)
	b.mu.Lock()
	b.place = place
	b.mu.Unlock()
	b.kick.Set()
}

// Routed are the addresses of Services that routers may send here, and whether they are known yet: with ClusterIPs, if these
// are asked for.
func (b *balancer) Routed(clusterIPs bool) ([]bgpconf.ServiceAddress, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.routed, b.known && (b.inner || !clusterIPs)
}

// joinInterval is how often those who are not heard of are looked for.
const joinInterval = 5 * time.Second

// run answers until the context ends, and then says goodbye, so that another node answers in its place at once.
func (b *balancer) run(ctx context.Context) {
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

// step brings what the node answers for from what it was to what it should be.
func (b *balancer) step(ctx context.Context) {
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
		// Who has just come and has not heard of the others would answer for all that they answer for.
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

// standIns are what the node answers in place of others, whose agents are away. Of a node that is on several segments
// with the address it is not known which of its Ethernet addresses is asked for.
func (b *balancer) standIns(f vip.Facts) (answers []announce.Answer, err error) {
	type place struct{ node, device string }
	macs := map[place]net.HardwareAddr{} // a look is at all neighbours of the device, and addresses are many
	for _, v := range b.verdicts {
		if v.StandIn != b.node || len(v.Devices) != 1 {
			continue
		}
		at := place{v.Announcer, v.Devices[0]}
		mac, looked := macs[at]
		if !looked {
			var failed error
			mac, failed = b.neighbourOf(f, at.node, at.device)
			macs[at], err = mac, errors.Join(err, failed)
		}
		if mac != nil {
			answers = append(answers, announce.Answer{Addr: v.Address, MAC: mac})
		}
	}
	return answers, err
}

// neighbourOf is the Ethernet address by which a device reaches a node, or nil. What fails is of interest without one.
func (b *balancer) neighbourOf(f vip.Facts, node, device string) (mac net.HardwareAddr, err error) {
	i := slices.IndexFunc(f.Nodes, func(n vip.Node) bool { return n.Name == node })
	for _, addr := range f.Nodes[i].Addrs {
		mac, failed := b.neighbour(device, addr)
		if mac != nil {
			return mac, nil
		}
		err = errors.Join(err, failed)
	}
	return nil, err
}

// waits notes why nothing is decided. What was decided before stays.
func (b *balancer) waits(why string) {
	b.mu.Lock()
	b.told.Waiting = why
	b.mu.Unlock()
}

// Account is what the node does about load balancers' addresses, and what it takes others to do.
func (b *balancer) Account() answer.Balancers {
	b.mu.Lock()
	defer b.mu.Unlock()
	account := b.told
	account.Keys = b.keyIDs
	return account
}

// tell logs what has come and gone.
func (b *balancer) tell(now []netip.Addr) {
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
func (b *balancer) readNode(n *corev1.Node) vip.Node {
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

// keepMember has the node known to the other agents once there is a key, and looks for those who are not heard of. It
// says whether that was tried once: to wait for an API server or a node that does not answer is left to others.
func (b *balancer) keepMember(ctx context.Context, place balancerPlace, nodes []*corev1.Node) (heard bool) {
	if time.Since(b.keyAt) >= b.resync {
		b.keyAt = time.Now()
		go func() {
			keys, err := b.source.Keys(ctx)
			b.keys <- foundKeys{keys, err}
			b.kick.Set()
		}()
	}
	select {
	case found := <-b.keys:
		b.isAsked = true
		if found.err == nil {
			b.startMember(membership.Options{Name: b.node, Addr: place.addrs[0], Port: membership.Port, Keys: found.keys, Nodes: membersOf(nodes)})
		} else if b.member == nil {
			b.log.Info("nodes are taken for alive while they are Ready: there is no key by which agents know each other", "error", found.err)
			b.keyAt = time.Now().Add(joinInterval - b.resync) // the controller may be about to make one
		}
	default:
	}
	if b.member == nil {
		return b.isAsked
	}
	b.member.SetNodes(membersOf(nodes))
	joined := false
	select {
	case <-b.joining: // never of a nil channel
		joined = true
	default:
	}
	if b.joining == nil || joined && time.Since(b.joinAt) >= joinInterval {
		b.join(ctx, place, nodes)
	}
	return joined
}

// join looks for some of those who are not heard of.
func (b *balancer) join(ctx context.Context, place balancerPlace, nodes []*corev1.Node) {
	b.joinAt = time.Now()
	var missing []netip.Addr
	for name, addrs := range membersOf(nodes) {
		i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is4() == place.addrs[0].Is4() })
		if i >= 0 && name != b.node && b.member.State(name) != membership.Alive {
			missing = append(missing, addrs[i])
		}
	}
	// A few at a time: who hears of one hears of all that one knows.
	rand.Shuffle(len(missing), func(i, j int) { missing[i], missing[j] = missing[j], missing[i] })
	const most = 5
	missing = missing[:min(len(missing), most)]
	done, member := make(chan struct{}), b.member
	b.joining = done
	go func() {
		defer b.kick.Set()
		defer close(done)
		member.Join(ctx, missing)
	}()
}

// membersOf returns the nodes whose agents may be members, and the addresses at which these listen. An agent listens at an
// InternalIP alone; an ExternalIP may be translated by a cloud's router, or be that of a gateway that drops the packets.
func membersOf(nodes []*corev1.Node) map[string][]netip.Addr {
	members := make(map[string][]netip.Addr, len(nodes))
	for _, n := range nodes {
		members[n.Name] = apinode.InternalAddrs(n)
	}
	return members
}

// startMember makes the node a member, or another one if its address has changed. Other keys it takes up as it is.
func (b *balancer) startMember(o membership.Options) {
	if b.member != nil && b.as.Addr == o.Addr {
		if slices.EqualFunc(b.as.Keys, o.Keys, bytes.Equal) {
			return
		}
		if err := b.member.SetKeys(o.Keys); err != nil {
			b.log.Warn("the key by which agents know each other is not changed", "error", err)
			return
		}
		b.setKeys(o.Keys)
		return
	}
	if b.member != nil {
		b.member.Leave()
		b.member = nil
	}
	o.Log, o.Changed = b.log, b.kick.Set
	member, err := membership.Start(o)
	if err != nil {
		b.log.Warn("nodes are taken for alive while they are Ready", "error", err)
		b.setKeys(nil)
		return
	}
	b.member, b.as, b.joining = member, o, nil
	b.setKeys(o.Keys)
}

// setKeys notes which keys the member has, and tells their names.
func (b *balancer) setKeys(keys [][]byte) {
	b.as.Keys = keys
	b.mu.Lock()
	b.keyIDs = keyset.IDs(keys)
	b.mu.Unlock()
	b.log.Info("agents know each other by other keys now", "keys", b.keyIDs)
}
