package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// dropsVerb is the agent's command that prints what policies have dropped on its node.
const dropsVerb = "drops"

// Drops asks nodes what policies do to packets.
type Drops struct {
	client *kube.Client
	nodes  map[netip.Addr]string // who has which address
	last   map[string]uint64     // of the last packet, by node
	lost   map[string]uint64
	known  map[string]string // problems that were told
	only   string
}

// OpenDrops returns what asks all nodes, or only one.
func OpenDrops(ctx context.Context, client *kube.Client, only string) (*Drops, error) {
	list, err := kube.List(ctx, client, kube.Nodes, kube.Selection{})
	if err != nil {
		return nil, err
	}
	d := &Drops{client: client, nodes: map[netip.Addr]string{}, last: map[string]uint64{}, lost: map[string]uint64{}, known: map[string]string{}, only: only}
	found := only == ""
	for _, n := range list {
		found = found || n.Name == only
		for _, a := range apinode.Addrs(n) {
			d.nodes[a] = n.Name
		}
	}
	if !found {
		return nil, fmt.Errorf("there is no node %s", only)
	}
	return d, nil
}

// Next returns what was recorded since it was called last, the oldest first, and what is wrong with nodes that was not told before.
func (d *Drops) Next(ctx context.Context) (all []answer.PolicyRecord, problems []error, err error) {
	agents, err := findAgents(ctx, d.client)
	if err != nil {
		return nil, nil, err
	}
	if d.only != "" {
		one := agents[d.only]
		if one == nil {
			return nil, nil, fmt.Errorf("no agent of Fathom's network runs on node %s", d.only)
		}
		agents = map[string]*corev1.Pod{d.only: one}
	}
	answers, failed := askEach[answer.PolicyRecords](ctx, d.client, agents, func(node string) []string {
		return []string{dropsVerb, "--after", strconv.FormatUint(d.last[node], 10)}
	})
	if ctx.Err() != nil {
		return nil, nil, ctx.Err()
	}
	for node := range agents {
		s, answers := answers[node]
		problem := s.Problem
		if !answers {
			problem = answer.OneLine(failed[node])
		}
		if problem != d.known[node] && problem != "" {
			problems = append(problems, fmt.Errorf("node %s: %s", node, problem))
		}
		if d.known[node] = problem; !answers {
			continue
		}
		if s.Lost > d.lost[node] {
			problems = append(problems, fmt.Errorf("node %s: %d packets came too fast to be recorded", node, s.Lost-d.lost[node]))
		}
		d.last[node], d.lost[node] = s.Last, s.Lost
		for _, r := range s.Records {
			r.Node = node
			r.From, r.To = d.named(r.From), d.named(r.To)
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b answer.PolicyRecord) int {
		return cmp.Or(a.Last.Compare(b.Last), strings.Compare(a.Node, b.Node), cmp.Compare(a.Number, b.Number))
	})
	slices.SortFunc(problems, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return all, problems, nil
}

// named says which node an end is, of which its agent knows only its own.
func (d *Drops) named(e answer.End) answer.End {
	if name, found := d.nodes[e.Addr]; found && e.Pod == "" {
		e.Node = name
	}
	return e
}

// DropsOf says whether a record is one of a pod, "NAMESPACE/NAME"; of any if it is empty.
func DropsOf(pod string, r answer.PolicyRecord) bool {
	return pod == "" || r.From.Pod == pod || r.To.Pod == pod
}

// ErrPodName says that a pod is not named with its namespace.
var ErrPodName = errors.New("want NAMESPACE/NAME")

// CheckPodName says whether a name is one of a pod with its namespace.
func CheckPodName(pod string) error {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return fmt.Errorf("--pod %s: %w", pod, ErrPodName)
	}
	return nil
}
