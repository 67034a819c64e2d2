package verify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Report is the result of a verification.
type Report struct {
	Nodes []NodeReport `json:"nodes"`
}

// NodeReport is the result for one node.
type NodeReport struct {
	Node        string   `json:"node"`
	Mode        string   `json:"mode,omitempty"`
	Pods        int      `json:"pods"`
	Routes      int      `json:"routes"`
	Frontends   int      `json:"frontends,omitempty"` // of Services, in nftables
	Connect     int      `json:"connect,omitempty"`   // of Services, translated at connect()
	Sessions    int      `json:"sessions,omitempty"`  // BGP sessions that are established
	Prefixes    int      `json:"prefixes,omitempty"`  // announced in these, counted once for every router
	Isolated    int      `json:"isolated,omitempty"`  // pods about which policies say something
	Differences []string `json:"differences"`
}

// OK reports whether there is no difference anywhere.
func (r Report) OK() bool {
	return !slices.ContainsFunc(r.Nodes, func(n NodeReport) bool { return len(n.Differences) > 0 })
}

// agentsAtOnce is how many nodes are read concurrently.
const agentsAtOnce = 16

// Run reads every node's kernel through its agent and compares it with the API. A cluster may change meanwhile: a
// difference counts only if a second reading finds it too.
func Run(ctx context.Context, client *kube.Client) (Report, error) {
	r, err := readTwice(ctx, client, podsQuestion(Pods))
	if err != nil {
		return Report{}, err
	}
	return r.report(func(n *NodeReport, s answer.Node) {
		n.Mode, n.Pods, n.Routes = string(s.Plan.Mode), len(s.Leases), len(s.Kernel.Routes)
	}), nil
}

// question is what an agent is asked, and how its answer is compared with what the cluster's objects imply.
type question[S any] struct {
	verb    string // a command of fathom-agent, which prints an S
	objects func(ctx context.Context, client *kube.Client) (Cluster, error)
	compare func(c Cluster, node string, s S) []podnet.Difference
	// whole, if set, returns the problems that the objects alone show.
	whole func(c Cluster) []podnet.Difference
}

func podsQuestion(compare func(c Cluster, node string, s answer.Node) []podnet.Difference) question[answer.Node] {
	return question[answer.Node]{
		verb: stateVerb, objects: readCluster, compare: compare,
		whole: func(c Cluster) []podnet.Difference { return append(Doubles(c.Pods), Blocks(c)...) },
	}
}

// readTwice reads and, if it finds anything, reads once more: a difference that was only in transition is gone then.
func readTwice[S any](ctx context.Context, client *kube.Client, q question[S]) (reading[S], error) {
	first, err := read(ctx, client, q)
	if err != nil || len(first.differences)+len(first.unread) == 0 {
		return first, err
	}
	second, err := read(ctx, client, q)
	return second.confirming(first), err
}

// reading is the result of one reading.
type reading[S any] struct {
	nodes       []string
	states      map[string]S
	differences map[string][]string
	// unread maps nodes whose kernels are unknown to the reasons. Their wording may change from reading to reading.
	unread map[string]string
}

// confirming keeps the differences that another reading has found as well, and all of unread.
func (r reading[S]) confirming(other reading[S]) reading[S] {
	confirmed := map[string][]string{}
	for node, differences := range r.differences {
		for _, d := range differences {
			if slices.Contains(other.differences[node], d) {
				confirmed[node] = append(confirmed[node], d)
			}
		}
	}
	r.differences = confirmed
	return r
}

// report combines each node's differences, or the reason why its state is unknown; tell adds further facts. Differences may
// belong to deleted nodes, such as their blocks.
func (r reading[S]) report(tell func(*NodeReport, S)) Report {
	report := Report{Nodes: []NodeReport{}}
	names := slices.AppendSeq(slices.Clone(r.nodes), maps.Keys(r.differences))
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		differences := append([]string{}, r.differences[n]...)
		if why, unread := r.unread[n]; unread {
			differences = append(differences, why)
		}
		node := NodeReport{Node: n, Differences: differences}
		tell(&node, r.states[n])
		report.Nodes = append(report.Nodes, node)
	}
	return report
}

func read[S any](ctx context.Context, client *kube.Client, q question[S]) (reading[S], error) {
	r := reading[S]{differences: map[string][]string{}, unread: map[string]string{}}
	agents, err := findAgents(ctx, client)
	if err != nil {
		return r, err
	}
	// Kernels are read before the API: a pod that is created meanwhile causes a difference in the second reading at most.
	states, failed := ask[S](ctx, client, agents, q.verb)
	r.states = states
	var c Cluster
	if c, err = q.objects(ctx, client); err != nil {
		return r, err
	}
	for _, n := range c.Nodes {
		r.nodes = append(r.nodes, n.Name)
		s, found := states[n.Name]
		switch {
		case failed[n.Name] != nil:
			r.unread[n.Name] = "its agent does not answer: " + answer.OneLine(failed[n.Name])
		case !found:
			r.unread[n.Name] = "no agent runs on it"
		default:
			for _, d := range q.compare(c, n.Name, s) {
				r.differences[n.Name] = append(r.differences[n.Name], d.Text)
			}
		}
	}
	if q.whole != nil {
		for _, d := range q.whole(c) {
			r.differences[d.Node] = append(r.differences[d.Node], d.Text)
		}
	}
	slices.Sort(r.nodes)
	return r, nil
}

var errNoAgents = errors.New("no agent of Fathom's network runs in namespace " + netconf.Namespace + " of this cluster: install it with `fathom install`")

// findAgents returns the agents' pods by node; it is an error if there are none.
func findAgents(ctx context.Context, client *kube.Client) (map[string]*corev1.Pod, error) {
	pods, err := kube.List(ctx, client, kube.Pods, kube.Selection{Namespace: netconf.Namespace, Labels: netconf.AgentSelector})
	if err != nil {
		return nil, err
	}
	agents := map[string]*corev1.Pod{}
	for _, p := range pods {
		if p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil {
			agents[p.Spec.NodeName] = p
		}
	}
	if len(agents) == 0 {
		return nil, errNoAgents
	}
	return agents, nil
}

// agentPatience is how long an agent has to answer, in case that it or its kubelet hangs.
const agentPatience = 15 * time.Second

// Limits on an agent's answer, since a node may be compromised. The largest legitimate answer has all Services of a
// cluster: 20 MB for ten thousand with ten endpoints each.
const (
	maxAnswer = 64 << 20
	maxWords  = 4 << 10
)

// bounded is a buffer of limited size. It reports the rest as written: an error would not end the stream, whose other end
// continues, but only be logged.
type bounded struct {
	bytes.Buffer
	most int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	room := b.most - b.Len()
	b.over = b.over || len(p) > room
	b.Buffer.Write(p[:min(len(p), room)])
	return len(p), nil
}

// stateVerb is the agent's command that prints its node's state, except for Services.
const stateVerb = "state"

// ask asks the agents of all nodes. failed holds the errors of those that did not answer.
func ask[S any](ctx context.Context, client *kube.Client, agents map[string]*corev1.Pod, verb string) (states map[string]S, failed map[string]error) {
	return askEach[S](ctx, client, agents, func(string) []string { return []string{verb} })
}

// askEach is ask with a command, and its arguments, for each node.
func askEach[S any](ctx context.Context, client *kube.Client, agents map[string]*corev1.Pod, command func(node string) []string) (states map[string]S, failed map[string]error) {
	states, failed = map[string]S{}, map[string]error{}
	type answer struct {
		node  string
		state S
		err   error
	}
	answers := make(chan answer, len(agents))
	g := errgroup.Group{}
	g.SetLimit(agentsAtOnce)
	for node, pod := range agents {
		g.Go(func() error {
			a := answer{node: node}
			out, stderr := bounded{most: maxAnswer}, bounded{most: maxWords}
			ctx, cancel := context.WithTimeoutCause(ctx, agentPatience, fmt.Errorf("no answer within %v", agentPatience))
			defer cancel()
			if a.err = client.Exec(ctx, pod, netconf.AgentContainer, nil, &out, &stderr, append([]string{netconf.AgentProgram}, command(node)...)...); a.err != nil {
				a.err = fmt.Errorf("%w: %s", a.err, strings.TrimSpace(stderr.String()))
			} else if out.over {
				a.err = fmt.Errorf("read the answer of the agent on node %s: it has more than %d bytes", node, out.most)
			} else if err := json.Unmarshal(out.Bytes(), &a.state); err != nil {
				a.err = fmt.Errorf("read the answer of the agent on node %s: %w", node, err)
			}
			answers <- a
			return nil
		})
	}
	_ = g.Wait()
	close(answers)
	for a := range answers {
		if a.err != nil {
			failed[a.node] = a.err
			continue
		}
		states[a.node] = a.state
	}
	return states, failed
}

func readCluster(ctx context.Context, client *kube.Client) (Cluster, error) {
	c, err := readNetwork(ctx, client)
	if err != nil {
		return c, err
	}
	c.Pods, err = kube.List(ctx, client, kube.Pods, kube.Selection{})
	return c, err
}

// readNetwork reads the objects that concern all pods, and BGPPeers.
func readNetwork(ctx context.Context, client *kube.Client) (Cluster, error) {
	config, err := client.CoreV1().ConfigMaps(netconf.Namespace).Get(ctx, netconf.ConfigMap, metav1.GetOptions{})
	if err != nil {
		return Cluster{}, fmt.Errorf("read the network's configuration: %w", err)
	}
	c, err := readRanges(ctx, client)
	if err != nil {
		return c, err
	}
	c.Config = config.Data
	if c.Blocks, err = kube.List(ctx, client, kube.IPBlocks, kube.Selection{}); err != nil {
		return c, err
	}
	c.BGPPeers, err = kube.List(ctx, client, kube.BGPPeers, kube.Selection{})
	return c, err
}

// readRanges reads Nodes and pools, the ranges that pools must not overlap, and what determines load balancers' addresses.
func readRanges(ctx context.Context, client *kube.Client) (c Cluster, err error) {
	if c.Nodes, err = kube.List(ctx, client, kube.Nodes, kube.Selection{}); err != nil {
		return c, err
	}
	if c.AddressPools, err = kube.List(ctx, client, kube.AddressPools, kube.Selection{}); err != nil {
		return c, err
	}
	if c.Pools, err = kube.List(ctx, client, kube.IPPools, kube.Selection{}); err != nil {
		return c, err
	}
	if c.ServiceCIDRs, err = kube.List(ctx, client, kube.ServiceCIDRs, kube.Selection{}); err != nil {
		return c, err
	}
	c.Namespaces, err = kube.List(ctx, client, kube.Namespaces, kube.Selection{})
	return c, err
}
