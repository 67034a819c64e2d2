package verify

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/policyfacts"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// policiesVerb is the agent's command that prints what its kernel holds of policies.
const policiesVerb = "policies"

// RunPolicies reads through its agent what every node's kernel holds of policies, and compares it with the API.
func RunPolicies(ctx context.Context, client *kube.Client) (Report, error) {
	var p policyfacts.Cluster
	r, err := readTwice(ctx, client, question[answer.Policies]{
		verb: policiesVerb,
		objects: func(ctx context.Context, client *kube.Client) (c Cluster, err error) {
			p, err = ReadPolicies(ctx, client)
			return Cluster{Nodes: p.Nodes}, err
		},
		compare: func(_ Cluster, node string, s answer.Policies) []podnet.Difference { return Policies(p, node, s) },
	})
	if err != nil {
		return Report{}, err
	}
	return r.report(func(n *NodeReport, s answer.Policies) {
		for _, a := range s.Kernel.Addrs {
			if a.Own {
				n.Pods++
			}
			if a.Own && !a.Free() {
				n.Isolated++
			}
		}
	}), nil
}

// Policies compares what a node's kernel holds of policies with what the cluster's objects imply. The numbers of identities and classes are
// the node's own: what they stand for is compared.
func Policies(c policyfacts.Cluster, node string, s answer.Policies) []podnet.Difference {
	d := differ{node: node}
	m := c.Model()
	any := m.Size().Policies > 0
	switch {
	case s.Problem != "":
		d.add("the agent says: %s", s.Problem)
	case !s.Known:
		d.add("the agent has not been told of policies by the API server")
	}
	switch {
	case !any && s.Found:
		d.add("there are no policies, but the kernel holds some: nftables table inet fathom-policy")
		return d.found
	case !any:
		return d.found
	case !s.Found:
		d.add("nftables table inet fathom-policy is missing, or its rules and chains are not those that the agent makes: policies may not be enforced")
		return d.found
	}
	if have, want := prefixTexts(s.KernelRanges), prefixTexts(s.Ranges); have != want {
		d.add("pods are closed until they are known in the ranges %s, want %s", have, want)
	}
	for _, text := range s.FastPath {
		d.add("the fast path does not hold what nftables does: %s", text)
	}
	w := &policyDiff{differ: &d, want: m.Facts(), have: s.Kernel, stands: map[policy.Number]string{}}
	w.identities()
	own := map[netip.Addr]bool{}
	for _, p := range c.Pods {
		name := service.Name{Namespace: p.Namespace, Name: p.Name}
		if p.Spec.NodeName != node {
			continue
		}
		for _, a := range podAddrs(p) {
			if at, found := m.PodAt(a); found && at == name {
				own[a] = true
			}
		}
	}
	w.pods(own)
	slices.SortFunc(d.found, func(a, b podnet.Difference) int { return cmp.Compare(a.Text, b.Text) })
	return slices.Compact(d.found)
}

func prefixTexts(list []netip.Prefix) string {
	var texts []string
	for _, p := range inet.Disjoint(list) {
		texts = append(texts, p.String())
	}
	slices.Sort(texts)
	return strings.Join(texts, ", ")
}

type policyDiff struct {
	*differ
	want, have policy.Facts
	// stands is what the kernel's numbers of identities stand for, by the first of their addresses that the API has.
	stands map[policy.Number]string
}

// identities compares which addresses are whose.
func (w *policyDiff) identities() {
	for _, a := range slices.SortedFunc(maps.Keys(w.have.Addrs), netip.Addr.Compare) {
		n := w.have.Addrs[a].Peer
		if want, found := w.want.Addrs[a]; found && n != 0 && w.stands[n] == "" {
			w.stands[n] = want.Of
		}
	}
	for a, want := range w.want.Addrs {
		switch have := w.have.Addrs[a]; {
		case have.Peer == 0:
			w.add("%s of Pod %s is not known: policies that select it as a peer do not find it", a, want.Pod)
		case have.Peer != policy.Unnumbered && w.stands[have.Peer] != want.Of:
			w.add("%s of Pod %s counts as %q, want %q", a, want.Pod, w.stands[have.Peer], want.Of)
		}
	}
	for a, have := range w.have.Addrs {
		if _, found := w.want.Addrs[a]; !found && have.Peer != 0 {
			w.add("%s counts as %q, but is no pod's address", a, cmp.Or(w.stands[have.Peer], have.Of))
		}
	}
}

// pods compares the node's own pods, and what their classes say. Pods of the same classes have the same difference.
func (w *policyDiff) pods(own map[netip.Addr]bool) {
	type pair struct{ have, want policy.Number }
	said := map[pair]bool{}
	for _, a := range slices.SortedFunc(maps.Keys(own), netip.Addr.Compare) {
		want, have := w.want.Addrs[a], w.have.Addrs[a]
		if !have.Own {
			w.add("Pod %s (%s) is closed: the kernel does not know its policies", want.Pod, a)
			continue
		}
		for _, d := range policy.Directions {
			switch who := fmt.Sprintf("%s of Pod %s (%s)", d, want.Pod, a); {
			case want.Isolated[d] == 0 || have.Isolated[d] == 0 || have.Audited[d] == want.Audited[d]:
			case have.Audited[d]:
				w.add("%s is open to what its policies forbid: they are audited, want %s enforced", who, policyNames(w.want.Classes[want.Isolated[d]]))
			default:
				w.add("%s is closed to what its policies only audit: %s", who, policyNames(w.want.Classes[want.Isolated[d]]))
			}
			for _, kind := range []struct {
				name       string
				have, want policy.Number
			}{{"NetworkPolicies", have.Isolated[d], want.Isolated[d]}, {"ClusterNetworkPolicies", have.Tiers[d], want.Tiers[d]}} {
				switch who := fmt.Sprintf("%s of Pod %s (%s)", d, want.Pod, a); {
				case kind.want != 0 && kind.have == 0:
					w.add("%s is open to what its policies forbid: no %s are asked, want %s", who, kind.name, policyNames(w.want.Classes[kind.want]))
				case kind.want == 0 && kind.have != 0:
					w.add("%s is asked about %s, but none selects it", who, kind.name)
				case kind.want != 0 && !said[pair{kind.have, kind.want}]:
					said[pair{kind.have, kind.want}] = true
					w.class(who, w.have.Classes[kind.have], w.want.Classes[kind.want])
				}
			}
		}
	}
	for a, have := range w.have.Addrs {
		if have.Own && !own[a] {
			w.add("%s may send and hear, but is no address of a pod of this node", a)
		}
	}
}

func policyNames(c *policy.Class) string {
	var names []string
	for _, p := range c.Policies {
		names = append(names, p.String())
	}
	return strings.Join(names, ", ")
}

// class compares what a pod may do.
func (w *policyDiff) class(who string, have, want *policy.Class) {
	wanted := map[string]policy.Reason{}
	of := map[policy.Number]string{}
	for _, a := range w.want.Addrs {
		of[a.Peer] = a.Of
	}
	for text, g := range grantTexts(want, of) {
		wanted[text] = g.By
	}
	held := grantTexts(have, w.stands)
	for text, by := range wanted {
		if _, found := held[text]; !found {
			w.add("%s: the kernel lacks: %s, by %s", who, text, by)
		}
	}
	for text := range held {
		if _, found := wanted[text]; !found {
			w.add("%s: no policy says: %s", who, text)
		}
	}
}

// grantTexts says in words what a class allows, but for identities that no address has: nobody meets these.
func grantTexts(c *policy.Class, identities map[policy.Number]string) map[string]policy.Grant {
	all := map[string]policy.Grant{}
	if c == nil {
		return all
	}
	say := func(g policy.Grant, peer string) {
		verb := "allowed"
		switch {
		case c.Tiers && g.Action == policy.Deny:
			verb = "denied"
		case c.Tiers && g.Action == policy.Pass:
			verb = "passed on"
		}
		all[fmt.Sprintf("%s %s %s", policy.GrantsText([]policy.Grant{g}), verb, peer)] = g
	}
	for _, a := range c.Allows {
		switch who, found := identities[a.Peer]; {
		case a.Peer == 0:
			say(a.Grant, "with anyone")
		case found && who != "":
			say(a.Grant, fmt.Sprintf("with pods %q", who))
		}
	}
	for _, b := range c.Blocks {
		say(b.Grant, fmt.Sprintf("with %s to %s", b.First, b.Last))
	}
	return all
}
