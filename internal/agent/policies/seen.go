package policies

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// seenAtMost is how many different flows are told at once.
const seenAtMost = 20_000

// Seen returns the connections of pods that are there, or were moments ago: those that the kernel tracks, those of pods' sockets and those judged by the fast path (which
// it carries past connection tracking), and those recorded as accepted or audited.
func (k *Keeper) Seen(ctx context.Context) (answer.SeenFlows, error) {
	node, err := nodeAddrs()
	if err != nil {
		return answer.SeenFlows{}, err
	}
	s := seen{node: node, flows: map[answer.SeenFlow]bool{}, translated: map[conntrack.Tuple]bool{}}
	flows, err := k.open()
	if err != nil {
		return answer.SeenFlows{}, err
	}
	defer flows.Close()
	if err := flows.Entries(ctx, conntrack.Filter{}, func(e conntrack.Entry) error { s.entry(e); return nil }); err != nil {
		return answer.SeenFlows{}, err
	}
	names, err := os.ReadDir(k.NetNS)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return answer.SeenFlows{}, err
	}
	for _, name := range names {
		err := connections(ctx, filepath.Join(k.NetNS, name.Name()), func(t conntrack.Tuple) error { s.socket(t); return nil })
		if err != nil && !errors.Is(err, os.ErrNotExist) && !conntrack.IsUnsupported(err) { // a pod that is gone took its sockets along
			return answer.SeenFlows{}, err
		}
	}
	k.mu.Lock()
	fast := k.fast.path
	k.mu.Unlock()
	if fast != nil {
		judged, err := fast.Flows()
		if err != nil {
			return answer.SeenFlows{}, err
		}
		for _, f := range judged {
			if !f.Refused {
				s.socket(f.Tuple)
			}
		}
	}
	k.records.mu.Lock()
	for key, r := range k.records.all {
		if r.Verdict != answer.Dropped {
			s.add(answer.SeenFlow{From: key.from, To: key.to, Protocol: key.protocol, Port: key.port})
		}
	}
	k.records.mu.Unlock()
	all := answer.SeenFlows{Flows: []answer.SeenFlow{}, More: s.more}
	for f := range s.flows {
		all.Flows = append(all.Flows, f)
	}
	return all, nil
}

type seen struct {
	node       map[netip.Addr]bool
	flows      map[answer.SeenFlow]bool
	translated map[conntrack.Tuple]bool // connections whose client believes in another peer
	more       bool
}

// entry adds an entry of connection tracking. One of TCP that nobody has answered is no connection yet.
func (s *seen) entry(e conntrack.Entry) {
	if e.Status&conntrack.DNAT != 0 {
		s.translated[e.Original] = true
	}
	if e.Protocol == service.TCP && e.Status&conntrack.SeenReply == 0 || e.Mark&ruleset.ForbiddenMark != 0 || e.Status&conntrack.Expected != 0 {
		return
	}
	s.add(answer.SeenFlow{From: e.Original.Source.Addr(), To: e.Reply.Source.Addr(), Protocol: uint8(e.Protocol), Port: e.Reply.Source.Port()})
}

func (s *seen) socket(t conntrack.Tuple) {
	if !s.translated[t] {
		s.add(answer.SeenFlow{From: t.Source.Addr(), To: t.Destination.Addr(), Protocol: uint8(service.TCP), Port: t.Destination.Port()})
	}
}

// add leaves out what policies are not about: a node and its own pods, and a pod and itself.
func (s *seen) add(f answer.SeenFlow) {
	f.From, f.To = f.From.Unmap(), f.To.Unmap()
	if f.From == f.To || f.From.IsLoopback() || f.To.IsLoopback() || s.node[f.From] || s.node[f.To] || f.Port == 0 {
		return
	}
	if len(s.flows) >= seenAtMost {
		s.more = s.more || !s.flows[f]
		return
	}
	s.flows[f] = true
}
