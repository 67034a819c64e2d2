package announcing

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/agent/announcing/membership"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/keyset"
)

// foundKeys is the result of reading the keys.
type foundKeys struct {
	keys [][]byte
	err  error
}

// joinInterval is how often those who are not heard of are looked for.
const joinInterval = 5 * time.Second

// keepMember makes the node a member once there is a key, and contacts agents that are not members. It reports whether an attempt
// has ended: it does not wait for an API server or a node that does not answer.
func (b *Balancer) keepMember(ctx context.Context, place place, nodes []*corev1.Node) (heard bool) {
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

// join contacts some of the agents that are not members.
func (b *Balancer) join(ctx context.Context, place place, nodes []*corev1.Node) {
	b.joinAt = time.Now()
	var missing []netip.Addr
	for name, addrs := range membersOf(nodes) {
		i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return a.Is4() == place.addrs[0].Is4() })
		if i >= 0 && name != b.node && b.member.State(name) != membership.Alive {
			missing = append(missing, addrs[i])
		}
	}
	// A few at a time: a member that is reached passes on all that it knows.
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

// startMember makes the node a member, or replaces the member if the node's address has changed. Changed keys are set without a
// restart.
func (b *Balancer) startMember(o membership.Options) {
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

// setKeys records the member's keys, and logs their names.
func (b *Balancer) setKeys(keys [][]byte) {
	b.as.Keys = keys
	b.mu.Lock()
	b.keyIDs = keyset.IDs(keys)
	b.mu.Unlock()
	b.log.Info("agents know each other by other keys now", "keys", b.keyIDs)
}
