package ruleset_test

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/packet"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// TestExplainServices sends what is explained: who answers, or that nobody does, and whom the endpoint sees.
func TestExplainServices(t *testing.T) {
	l := newLab(t)
	p, err := service.ByPacketOf(manyKinds())
	if err != nil {
		t.Fatal(err)
	}
	set(t, l.rules, p)
	for _, name := range []string{"ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"} { // there are more refusals than the kernel tells of
		testenv.Must(t, l.node.Sysctl(name, "0"))
	}
	rules := make(chan string, 10000)
	t.Run("packets", func(t *testing.T) {
		for _, f := range families {
			for _, protocol := range []service.Protocol{service.TCP, service.UDP} {
				t.Run(protocol.String()+f.network, func(t *testing.T) {
					t.Parallel()
					for _, x := range p.Frontends {
						if x.Protocol == protocol && x.Addr.Is4() == (f.network == "4") {
							explainFrontend(t, l, p, f, x, rules)
						}
					}
				})
			}
		}
	})
	close(rules)
	looked := map[string]bool{}
	for rule := range rules {
		if !looked[rule] {
			linktest.Run(t, l.node, "sh", "-c", rule) // shows what it says
			looked[rule] = true
		}
	}
	if len(looked) < 20 {
		t.Errorf("only these rules were named: %v", looked)
	}
}

func explainFrontend(t *testing.T, l *lab, p service.Plan, f addresses, x service.Frontend, rules chan<- string) {
	addr := netip.MustParseAddr
	parts := []packet.Part{service.ByRules{Plan: p}, service.ByRulesAfter{Plan: p, Local: []netip.Addr{addr(f.node)}}}
	for _, from := range []struct {
		n      *link.Namespace
		origin packet.Origin
		addr   string
	}{{l.a, packet.Pod, f.a}, {l.b, packet.Pod, f.b}, {l.out, packet.Elsewhere, f.out}, {l.out, packet.Elsewhere, f.out2}, {l.node, packet.Node, f.node}} {
		dialled := []netip.Addr{x.Addr}
		if x.Addr.IsUnspecified() {
			dialled = []netip.Addr{addr(f.node)}
			if from.origin == packet.Node && f.loopback != "" {
				dialled = append(dialled, addr(f.loopback))
			}
		}
		for _, to := range dialled {
			first := packet.Packet{Origin: from.origin, Protocol: uint8(x.Protocol), Src: netip.AddrPortFrom(addr(from.addr), 0), Dst: netip.AddrPortFrom(to, x.Port)}
			paths := packet.Follow(first, parts...)
			for _, path := range paths {
				for _, h := range path.Hops {
					if h.Rule != "" {
						rules <- h.Rule
					}
					if h.Verdict == packet.Translate && h.Hook != "postrouting" && h.Object != "Service "+x.Service.String() {
						t.Errorf("%v: %+v names another object than %s", first, h, x.Service)
					}
				}
			}
			source := from.addr
			if from.origin == packet.Node {
				source = "" // the kernel chooses
			}
			proveExplained(t, from.n, strings.ToLower(x.Protocol.String())+f.network, source, first, paths)
		}
	}
}

// proveExplained sends a packet of which paths are said to be all that may become of it.
func proveExplained(t *testing.T, n *link.Namespace, network, from string, first packet.Packet, paths []packet.Path) {
	t.Helper()
	wait := patience
	if paths[0].Verdict() == packet.Drop {
		wait = silence
	}
	for range 4 {
		server, client, err := ask(n, network, from, first.Dst.String(), wait)
		switch paths[0].Verdict() {
		case packet.Drop:
			if !isTimeout(err) && !errors.Is(err, syscall.EPERM) {
				t.Errorf("%s %v is dropped (%s), and %s answers, %v", network, first, paths[0].Hops[0].Why, server, err)
			}
			return
		case packet.Reject:
			if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.EPERM) {
				t.Errorf("%s %v is rejected (%s), and %s answers, %v", network, first, paths[0].Hops[0].Why, server, err)
			}
			return
		}
		if err != nil {
			t.Errorf("%s %v: %v; it is explained by %+v", network, first, err, paths)
			return
		}
		var end *packet.Packet
		for i := range paths {
			if paths[i].End.Dst.Addr().String() == server {
				end = &paths[i].End
			}
		}
		switch {
		case end == nil:
			t.Errorf("%s %v: %s answers, who is not among %+v", network, first, server, paths)
		case from != "" && end.Src.IsValid() != (client == from):
			t.Errorf("%s %v: %s sees %s, and it is explained that it leaves from %v", network, first, server, client, end.Src)
		}
	}
}

// TestExplainMasquerade sends what is explained to a pod, a node, an address that is to see pods, and elsewhere.
func TestExplainMasquerade(t *testing.T) {
	l := newLab(t)
	addr := netip.MustParseAddr
	for _, f := range families {
		for _, at := range []struct {
			addr string
			in   *link.Namespace
		}{{f.out, l.out}, {f.out2, l.out}} {
			serve(t, at.in, netip.AddrPortFrom(addr(at.addr), 8080))
		}
	}
	m := podnet.Masquerade{
		Sources: prefixes("10.244.1.0/24", "fd00:10:244:1::/64"), Pods: prefixes("10.244.0.0/16", "fd00:10:244::/48"),
		Others: prefixes("203.0.113.10/32", "2001:db8:2::10/128"),
	}
	if _, err := l.rules.SetMasquerade(m); err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, to := range []string{f.far, f.b, f.out, f.out2} {
			first := packet.Packet{Origin: packet.Pod, Protocol: uint8(service.TCP), Src: netip.AddrPortFrom(addr(f.a), 0), Dst: netip.AddrPortFrom(addr(to), 8080)}
			paths := packet.Follow(first, m)
			if len(paths) != 1 || len(paths[0].Hops) != 1 {
				t.Errorf("%v is explained by %+v", first, paths)
				continue
			}
			if rule := paths[0].Hops[0].Rule; rule != "" {
				linktest.Run(t, l.node, "sh", "-c", rule)
			}
			if outside := to == f.out; outside != (paths[0].Hops[0].Verdict == packet.Translate) {
				t.Errorf("%v: %s", first, paths[0].Hops[0].Why)
			}
			proveExplained(t, l.a, "tcp"+f.network, f.a, first, paths)
		}
	}
}
