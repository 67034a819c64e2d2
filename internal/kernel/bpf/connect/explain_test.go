package connect_test

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/packet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// TestExplain has sockets do what is explained.
func TestExplain(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	var all []service.Frontend
	for _, s := range sides[1:] {
		var ends []string
		for _, e := range s.ends {
			ends = append(ends, at(e, 8080).String())
			answer(t, at(e, 8080))
		}
		for _, p := range []string{"/TCP", "/UDP"} {
			drop, some := frontend(at(s.vip, 82).String()+p), frontend(at(s.vip, 83).String()+p, ends...)
			drop.Inside.Drop, some.Sources = true, []netip.Prefix{}
			all = append(all, frontend(at(s.vip, 80).String()+p, ends...), frontend(at(s.vip, 81).String()+p), drop, some,
				frontend(at(s.vip, service.DNSPort).String()+p, ends[0]))
		}
	}
	b.plan = plan(all...)
	b.set(t)
	held, err := b.Frontends()
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(held, func(a, b service.Balanced) int { return a.Compare(b.Key) })
	names := map[uint32]service.Name{}
	for _, f := range all {
		names[service.ID(f.Service)] = f.Service
	}
	part := service.AtConnect{Held: held, Names: names}
	verdicts := map[string]int{}
	for _, f := range all {
		senders := []packet.Sender{packet.Connected}
		if f.Protocol == service.UDP {
			senders = append(senders, packet.Unconnected)
		}
		for _, sender := range senders {
			p := packet.Packet{Origin: packet.Pod, Sender: sender, Protocol: uint8(f.Protocol), Dst: netip.AddrPortFrom(f.Addr, f.Port)}
			hops := part.Explain(p)
			verdict := "nothing"
			if len(hops) > 0 {
				verdict = hops[0].Verdict.String()
			}
			verdicts[verdict]++
			if verdict == "translate" && hops[0].Object != "Service "+f.Service.String() {
				t.Errorf("%v: %q is said to be of %q", p, f.Service, hops[0].Object)
			}
			to, done := wish(t, b, p)
			reached := slices.ContainsFunc(append([]packet.Hop{{}}, hops...)[len(hops)].Out, func(o packet.Packet) bool { return o.Dst == to })
			switch {
			case verdict == "translate" && (done != nil || !reached):
				t.Errorf("%s %s of %s is explained by %+v; it is at %s, %v", sender, p, f.Protocol, hops, to, done)
			case verdict == "reject" && !errors.Is(done, refusal()):
				t.Errorf("%s %s of %s is explained by %+v; the socket says %v", sender, p, f.Protocol, hops, done)
			case (verdict == "pass" || verdict == "nothing") && to.IsValid():
				t.Errorf("%s %s of %s is explained by %+v; it is translated to %s", sender, p, f.Protocol, hops, to)
			}
		}
	}
	for _, v := range []string{"translate", "reject", "pass", "nothing"} {
		if verdicts[v] == 0 {
			t.Errorf("nothing is explained by %q: %v", v, verdicts)
		}
	}
}

// wish has a socket talk to an address, and returns what it is told, and the endpoint that it was given, if any.
func wish(t *testing.T, b *balancer, p packet.Packet) (endpoint netip.AddrPort, err error) {
	t.Helper()
	s := newSocket(t, p.Dst.Addr().Is6(), service.Protocol(p.Protocol))
	defer s.close()
	if p.Sender == packet.Unconnected {
		if err = s.send(p.Dst); err == nil {
			endpoint, _ = s.receive(t)
		}
		return endpoint, err
	}
	if err = s.connect(p.Dst); errors.Is(err, unix.ENETUNREACH) { // it keeps the address, to which there is no way here
		return endpoint, nil
	}
	if err != nil {
		return endpoint, err
	}
	tr, found, lookup := b.Translated(s.cookie(t))
	if lookup != nil {
		t.Fatal(lookup)
	}
	if found {
		endpoint = tr.Backend
	}
	return endpoint, nil
}
