package announcing

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// note keeps what routers are told of Services' addresses, for who asks.
func (b *BGP) note(node string, want bgpconf.Speaker, peers []*v1alpha1.BGPPeer, sessions []bgp.Session, found []bgpconf.Problem) {
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
func (b *BGP) keep(node bgpconf.Node, want bgpconf.Speaker, found []bgpconf.Problem) {
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
func (b *BGP) Account() (answer.BGP, error) {
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
func (b *BGP) Routers() []answer.Router {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.told
}

// tellSessions makes an event of each session that has come up or gone, and sets the metrics.
func (b *BGP) tellSessions(peers []*v1alpha1.BGPPeer, sessions []bgp.Session) {
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
		e := kube.Event{Object: kube.Reference(peers[i]), Reason: "SessionUp", Message: fmt.Sprintf("node %s: %d prefixes are announced to %s", b.Node, s.Routes, s.Address)}
		if !up[s.Peer] {
			e.Warning, e.Reason, e.Message = true, "SessionDown", fmt.Sprintf("node %s: the session with %s is %s: %s", b.Node, s.Address, s.State, cmp.Or(s.Reason, "no reason was given"))
		}
		b.Events.Record(e)
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
func (b *BGP) publishSession(p *v1alpha1.BGPPeer, nodes []*corev1.Node, want *v1alpha1.BGPSession) {
	selected := 0
	for _, n := range nodes {
		if ok, err := bgpconf.Selects(p, n.Labels); ok && err == nil {
			selected++
		}
	}
	if selected > maxTold {
		want = nil
	}
	have := bgpconf.SessionOf(p, b.Node)
	same := have == nil && want == nil || have != nil && want != nil && have.State == want.State && have.Message == want.Message &&
		have.Prefixes == want.Prefixes && have.Since.Equal(&want.Since)
	object := "bgppeer/" + p.Name
	if same {
		b.Writes.Withdraw(object)
		return
	}
	b.Writes.Publish(object, func(ctx context.Context) error {
		return b.API.PublishBGPSession(ctx, p.Name, b.Node, want)
	})
}
