package policies

import (
	"net/netip"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// TestSeen: a connection is seen as policies judge it, once, and what they are not about is not.
func TestSeen(t *testing.T) {
	port := netip.MustParseAddrPort
	const answered = conntrack.SeenReply
	entry := func(protocol service.Protocol, from, to, by string, status conntrack.Status, mark uint32) conntrack.Entry {
		return conntrack.Entry{Protocol: protocol, Original: conntrack.Tuple{Source: port(from), Destination: port(to)}, Reply: conntrack.Tuple{Source: port(by), Destination: port(from)}, Status: status, Mark: mark}
	}
	s := seen{node: map[netip.Addr]bool{netip.MustParseAddr("192.0.2.10"): true}, flows: map[answer.SeenFlow]bool{}, translated: map[conntrack.Tuple]bool{}}
	for _, e := range []conntrack.Entry{
		entry(service.TCP, "10.244.1.2:4711", "10.96.0.1:80", "10.244.1.3:8080", answered|conntrack.DNAT, 0),
		entry(service.TCP, "10.244.1.2:4712", "10.244.1.3:8080", "10.244.1.3:8080", answered, 0),
		entry(service.TCP, "10.244.1.2:4713", "10.244.1.9:80", "10.244.1.9:80", 0, 0),                                // nobody has answered
		entry(service.UDP, "10.244.1.2:4714", "10.244.1.3:53", "10.244.1.3:53", 0, 0),                                // nobody has to
		entry(service.TCP, "10.244.1.4:4715", "10.244.1.3:8080", "10.244.1.3:8080", answered, ruleset.ForbiddenMark), // policies ended it
		entry(service.TCP, "192.0.2.10:4716", "10.244.1.3:8080", "10.244.1.3:8080", answered, 0),                     // a probe
		entry(service.TCP, "10.244.1.3:20", "10.244.1.2:50000", "10.244.1.2:50000", answered|conntrack.Expected, 0),
	} {
		s.entry(e)
	}
	for _, c := range [][2]string{{"10.244.1.2:4711", "10.96.0.1:80"}, {"10.244.1.2:4720", "10.244.2.2:443"}, {"127.0.0.1:1", "127.0.0.1:2"}, {"[::ffff:10.244.1.2]:4721", "[::ffff:10.244.2.2]:443"}} {
		s.socket(conntrack.Tuple{Source: port(c[0]), Destination: port(c[1])})
	}
	addr := netip.MustParseAddr
	want := map[answer.SeenFlow]bool{
		{From: addr("10.244.1.2"), To: addr("10.244.1.3"), Protocol: 6, Port: 8080}: true,
		{From: addr("10.244.1.2"), To: addr("10.244.1.3"), Protocol: 17, Port: 53}:  true,
		{From: addr("10.244.1.2"), To: addr("10.244.2.2"), Protocol: 6, Port: 443}:  true,
	}
	for f := range want {
		if !s.flows[f] {
			t.Errorf("%v is not seen", f)
		}
	}
	for f := range s.flows {
		if !want[f] {
			t.Errorf("%v is seen", f)
		}
	}
}
