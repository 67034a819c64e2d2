package verify

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/ping"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Place is an end of test packets: a pod or a node.
type Place struct {
	ping.Place
	Node string `json:"node"`
}

func (p Place) isNode() bool { return strings.HasPrefix(p.Name, "node/") }

// Way is the result of packets from one place to another and back.
type Way struct {
	From   string        `json:"from"`
	To     string        `json:"to"`
	Probes []ping.Result `json:"probes"`
	// Problems lists violations of the network model.
	Problems []string `json:"problems,omitempty"`
}

// Matrix has the ways between all places, ordered by From and To.
type Matrix struct {
	Places []Place `json:"places"`
	Ways   []Way   `json:"ways"`
	// Problems names places and nodes that could not be reached.
	Problems []string `json:"problems,omitempty"`
}

// OK reports whether the network is as Kubernetes demands.
func (m Matrix) OK() bool {
	return len(m.Problems) == 0 && !slices.ContainsFunc(m.Ways, func(w Way) bool { return len(w.Problems) > 0 })
}

// small is the size of the first packet of a way, which fits any link.
const small = 128

// Ping sends test packets between places. The agents send them in the pods' namespaces, so pods need no program for it.
// from and to select places by name. https://kubernetes.io/docs/concepts/services-networking/#the-kubernetes-network-model
func Ping(ctx context.Context, client *kube.Client, from, to func(name string) bool) (Matrix, error) {
	agents, err := findAgents(ctx, client)
	if err != nil {
		return Matrix{}, err
	}
	var m Matrix
	states, failed := ask[answer.Node](ctx, client, agents, stateVerb)
	for node, err := range failed {
		m.Problems = append(m.Problems, fmt.Sprintf("node %s: its agent does not answer: %s", node, answer.OneLine(err)))
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sessions := map[string]*session{}
	defer func() {
		for _, s := range sessions {
			s.close()
		}
	}()
	for node, s := range states {
		session, places, err := open(ctx, client, agents[node], s.Addresses)
		if err != nil {
			m.Problems = append(m.Problems, fmt.Sprintf("node %s: %s", node, answer.OneLine(err)))
			continue
		}
		sessions[node] = session
		for _, p := range places {
			m.Places = append(m.Places, Place{p, node})
			if p.Problem != "" {
				m.Problems = append(m.Problems, fmt.Sprintf("%s: %s", p.Name, p.Problem))
			}
		}
	}
	slices.SortFunc(m.Places, func(a, b Place) int { return cmp.Compare(a.Name, b.Name) })
	probes := map[string][]ping.Probe{} // by node
	var ways []Way
	at := map[string][]int{} // by node: the index of each probe's way
	for _, a := range m.Places {
		for _, b := range m.Places {
			if a.Name == b.Name || a.Problem != "" || b.Problem != "" || !from(a.Name) || !to(b.Name) {
				continue
			}
			ways = append(ways, Way{From: a.Name, To: b.Name})
			for _, p := range probesOf(a, b, states[a.Node].Plan.PodMTU) {
				probes[a.Node] = append(probes[a.Node], p)
				at[a.Node] = append(at[a.Node], len(ways)-1)
			}
		}
	}
	results := map[string][]ping.Result{}
	g, gctx := errgroup.WithContext(ctx)
	type reply struct {
		node    string
		results []ping.Result
	}
	answers := make(chan reply, len(sessions))
	for node, s := range sessions {
		g.Go(func() error {
			r, err := s.send(gctx, probes[node])
			if err != nil {
				return fmt.Errorf("send test packets from node %s: %w", node, err)
			}
			answers <- reply{node, r}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return m, err
	}
	close(answers)
	for a := range answers {
		results[a.node] = a.results
	}
	for node, list := range results {
		for i, r := range list {
			w := &ways[at[node][i]]
			w.Probes = append(w.Probes, r)
		}
	}
	places := map[string]Place{}
	for _, p := range m.Places {
		places[p.Name] = p
	}
	for i := range ways {
		judge(&ways[i], places, states)
	}
	m.Ways = ways
	slices.Sort(m.Problems)
	return m, nil
}

// probesOf returns the packets from a to b: for each family a small one, one of the MTU that must not be fragmented, and
// one that must be.
func probesOf(a, b Place, mtu int) []ping.Probe {
	var list []ping.Probe
	for _, to := range b.Addresses {
		if !slices.ContainsFunc(a.Addresses, func(x netip.Addr) bool { return x.Is4() == to.Is4() }) {
			continue
		}
		for _, size := range []int{small, mtu, 2*mtu + 100} {
			list = append(list, ping.Probe{From: a.Name, To: netip.AddrPortFrom(to, b.Port), Size: size, MTU: mtu})
		}
	}
	return list
}

// judge records what is wrong with a way.
func judge(w *Way, places map[string]Place, states map[string]answer.Node) {
	a, b := places[w.From], places[w.To]
	if len(w.Probes) == 0 {
		w.Problems = append(w.Problems, "they have no addresses of the same family")
	}
	for _, r := range w.Probes {
		if r.Error != "" {
			w.Problems = append(w.Problems, fmt.Sprintf("%d bytes to %s: %s", r.Size, r.To.Addr(), r.Error))
			continue
		}
		if allowed := sources(a, b, r.To.Addr(), states); !slices.Contains(allowed, r.Source) {
			w.Problems = append(w.Problems, fmt.Sprintf("%s saw %s, but %s is %s", r.To.Addr(), r.Source, a.Name, join(allowed)))
		}
	}
	slices.Sort(w.Problems)
	w.Problems = slices.Compact(w.Problems)
}

// sources returns the addresses that b may see as a's.
func sources(a, b Place, to netip.Addr, states map[string]answer.Node) []netip.Addr {
	own := a.Addresses
	s := states[a.Node]
	if a.isNode() {
		if t := s.Plan.Tunnel; t != nil {
			own = append(slices.Clone(own), t.Addrs...)
		}
		return own
	}
	// A node behind a tunnel sees the node's address, as docs/design/podnet.md says: the network in between knows pods'
	// addresses only inside of the tunnel.
	if b.isNode() && b.Node != a.Node && wayTo(s.Plan, b.Node, to) == podnet.VXLAN {
		return s.Addresses
	}
	return own
}

func wayTo(p podnet.Plan, node string, to netip.Addr) podnet.Mode {
	for _, peer := range p.Peers {
		if peer.Node == node {
			if to.Is4() {
				return peer.IPv4
			}
			return peer.IPv6
		}
	}
	return ""
}

// session is a running `fathom-agent probe` in an agent's pod.
type session struct {
	in   *io.PipeWriter
	enc  *json.Encoder
	dec  *json.Decoder
	out  *io.LimitedReader // what dec reads, limited for each answer
	done chan struct{}     // closed when the command in the pod has ended
}

// open starts a session and returns the places where it listens.
func open(ctx context.Context, client *kube.Client, agent *corev1.Pod, addrs []netip.Addr) (*session, []ping.Place, error) {
	inReader, inWriter := io.Pipe()
	outReader, outWriter := io.Pipe()
	out := &io.LimitedReader{R: outReader, N: maxAnswer}
	s := &session{in: inWriter, enc: json.NewEncoder(inWriter), dec: json.NewDecoder(out), out: out, done: make(chan struct{})}
	go func() {
		var stderr strings.Builder
		err := client.Exec(ctx, agent, netconf.AgentContainer, inReader, outWriter, &stderr,
			netconf.AgentProgram, "probe", "--address", join(addrs))
		if err != nil && stderr.Len() > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
		}
		outWriter.CloseWithError(cmp.Or(err, io.EOF))
		inReader.CloseWithError(io.ErrClosedPipe)
		close(s.done)
	}()
	var hello ping.Response
	if err := s.dec.Decode(&hello); err != nil {
		s.close()
		return nil, nil, fmt.Errorf("listen for test packets: %w", err)
	}
	return s, hello.Places, nil
}

// send has the agent send probes, and returns their results in order.
func (s *session) send(ctx context.Context, probes []ping.Probe) ([]ping.Result, error) {
	if len(probes) == 0 {
		return nil, nil
	}
	if err := s.enc.Encode(ping.Request{Probes: probes}); err != nil {
		return nil, err
	}
	s.out.N = maxAnswer
	var r ping.Response
	if err := s.dec.Decode(&r); err != nil {
		return nil, errors.Join(err, ctx.Err())
	}
	if len(r.Results) != len(probes) {
		return nil, fmt.Errorf("%d results of %d test packets", len(r.Results), len(probes))
	}
	return r.Results, nil
}

// close ends the session and waits for its end.
func (s *session) close() {
	_ = s.in.Close()
	<-s.done
}
