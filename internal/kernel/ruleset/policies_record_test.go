package ruleset_test

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/nflog"
	kernel "github.com/fathom-network/fathom/internal/kernel/nft"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// heard are the records of a namespace, by what they say: "denied egress 10.244.1.2 10.244.0.2 6".
type heard struct {
	sync.Mutex
	counts map[string]int
}

func listen(t *testing.T, n *link.Namespace) *heard {
	t.Helper()
	r, err := nflog.Open(n.Path(), ruleset.RecordGroup, ruleset.RecordBytes)
	testenv.Must(t, err)
	h := &heard{counts: map[string]int{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.Run(ctx, func(p nflog.Packet) {
			is, ok := ruleset.ParseRecord(p.Prefix)
			if !ok {
				t.Errorf("a record of %q", p.Prefix)
			}
			h.Lock()
			defer h.Unlock()
			h.counts[fmt.Sprintf("%s %s %s %s %d", is.Kind, is.Direction, p.From, p.To, p.Protocol)]++
		}, func(n int) { t.Logf("%d lost", n) })
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		r.Close()
	})
	return h
}

func (h *heard) await(t *testing.T, what string) {
	t.Helper()
	testenv.Eventually(t, what, func() (bool, string) {
		h.Lock()
		defer h.Unlock()
		return h.counts[what] > 0, fmt.Sprint(h.counts)
	})
}

func (h *heard) of(what string) int {
	h.Lock()
	defer h.Unlock()
	return h.counts[what]
}

// datagrams sends without waiting for anything.
func datagrams(t *testing.T, n *link.Namespace, source, to string, times int) {
	t.Helper()
	testenv.Must(t, n.Do(func() error {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(source), 0)))
		if err != nil {
			return err
		}
		defer c.Close()
		for range times {
			if _, err := c.WriteToUDPAddrPort([]byte("x"), netip.MustParseAddrPort(to)); err != nil {
				return err
			}
		}
		return nil
	}))
}

// TestPoliciesRecord: what is dropped, would be, and is allowed is recorded with kind and direction, and nothing else is.
func TestPoliciesRecord(t *testing.T) {
	l := newLab(t)
	in := named("in", app("a"), policy.Ingress) // which far may reach
	rule(in, policy.Ingress, policy.Rule{Peers: []policy.Peer{podsOf("y", nil)}, AnyPort: true})
	watch := named("watch", app("b"), policy.Ingress)
	watch.Audit = true
	m := modelOf(in, watch, named("out", app("b"), policy.Egress))
	_, err := l.rules.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	h := listen(t, l.node)
	for _, f := range families {
		udp := "udp" + f.network
		hears(t, l.out, udp, f.out, host(f.a, 8080))
		h.await(t, fmt.Sprintf("denied ingress %s %s 17", f.out, f.a))
		hears(t, l.b, "tcp"+f.network, f.b, host(f.far, 8080))
		h.await(t, fmt.Sprintf("denied egress %s %s 6", f.b, f.far))
		passes(t, l.far, udp, f.far, host(f.b, 8080), m.Facts())
		h.await(t, fmt.Sprintf("audited ingress %s %s 17", f.far, f.b))
		passes(t, l.far, "tcp"+f.network, f.far, host(f.a, 8080), m.Facts())
		h.await(t, fmt.Sprintf("accepted ingress %s %s 6", f.far, f.a))
		passes(t, l.a, udp, f.a, host(f.far, 8080), m.Facts()) // whom nothing isolates
	}
	m.DeletePod(service.Name{Namespace: "x", Name: "b"})
	testenv.Must(t, l.rules.ChangePolicies(m.Changes()))
	f := families[0]
	hears(t, l.b, "udp4", f.b, host(f.far, 8080))
	h.await(t, fmt.Sprintf("closed egress %s %s 17", f.b, f.far))
	for _, f := range families {
		for _, d := range policy.Directions {
			for _, k := range []ruleset.Kind{ruleset.Denied, ruleset.Closed, ruleset.Audited, ruleset.Accepted} {
				if what := fmt.Sprintf("%s %s %s %s 17", k, d, f.a, f.far); h.of(what) > 0 {
					t.Errorf("recorded: %s", what)
				}
			}
		}
	}
}

// TestPoliciesRecordFloods: who sends very much that is dropped is recorded seldom, and others are all the same.
func TestPoliciesRecordFloods(t *testing.T) {
	l := newLab(t)
	_, err := l.rules.SetPolicies(modelOf(named("deny", nil, policy.Ingress, policy.Egress)).Facts(), ownRanges)
	testenv.Must(t, err)
	h := listen(t, l.node)
	f := families[0]
	const flood = 20_000
	datagrams(t, l.b, f.b, host(f.far, 8080), flood)
	datagrams(t, l.a, f.a, host(f.far, 8080), 1)
	h.await(t, fmt.Sprintf("denied egress %s %s 17", f.a, f.far))
	of := h.of(fmt.Sprintf("denied egress %s %s 17", f.b, f.far))
	if of == 0 || of > flood/10 {
		t.Errorf("%d of %d packets are recorded", of, flood)
	}
}

// mute is a kernel that cannot log.
type mute struct{ kernel.Kernel }

func (m mute) Commit(x kernel.Transaction) error {
	if x.Make != nil {
		for _, c := range x.Make.Chains {
			for _, r := range c.Rules {
				if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool { _, is := e.(*expr.Log); return is }) {
					return fmt.Errorf("add a rule: %w", unix.ENOENT)
				}
			}
		}
	}
	return m.Kernel.Commit(x)
}

// TestPoliciesWithoutRecords: a kernel that cannot log has the same table without records, and drops.
func TestPoliciesWithoutRecords(t *testing.T) {
	l := newLab(t)
	conn, err := kernel.Open(l.node.Path())
	testenv.Must(t, err)
	rules := ruleset.New(mute{conn})
	defer rules.Close()
	m := modelOf(named("deny", app("a"), policy.Ingress))
	setPolicies(t, rules, m.Facts(), mustCount(t, m))
	passes(t, l.far, "tcp4", families[0].far, host(families[0].a, 8080), m.Facts())
	passes(t, l.far, "tcp4", families[0].far, host(families[0].b, 8080), m.Facts())
	reader, err := ruleset.Open(l.node.Path())
	testenv.Must(t, err)
	defer reader.Close()
	if _, _, found, err := reader.Policies(); err != nil || !found {
		t.Errorf("one who reads it: found %v, %v", found, err)
	}
}

// mustCount is how many elements there are in the table of what a Model says.
func mustCount(t *testing.T, m *policy.Model) diff.Count {
	t.Helper()
	_, r := space(t)
	count, err := r.SetPolicies(m.Facts(), ownRanges)
	testenv.Must(t, err)
	return count
}
