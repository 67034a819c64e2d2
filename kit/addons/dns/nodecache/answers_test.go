package nodecache

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/upstream"
)

// TestLargeAnswers keeps more of the largest answers that a message can hold than there is room for.
func TestLargeAnswers(t *testing.T) {
	label := strings.Repeat("x", 61)
	owner := strings.Join([]string{label, label, label, label}, ".") + "."
	large := func(i int) *answer {
		m := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.example.", i), dns.TypeNS)
		m.Response = true
		for len(m.Answer) < 4500 { // each is 14 bytes of a message that is compressed
			m.Answer = append(m.Answer, &dns.NS{Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeNS, Class: dns.ClassINET, Ttl: 30}, Ns: owner})
		}
		return newAnswer(upstream.QuestionOf(m), m, time.Unix(1e9, 0), maxTTL)
	}
	s := newAnswers()
	small := new(dns.Msg).SetQuestion("small.example.", dns.TypeA)
	small.Response = true
	small.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "small.example.", Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(10, 0, 0, 1)}}
	s.keep(newAnswer(upstream.QuestionOf(small), small, time.Unix(1e9, 0), maxTTL))
	var all []*answer
	for i := range 40 {
		all = append(all, large(i))
		s.keep(all[i])
		s.keep(all[i]) // as when it is asked for again
	}
	size := all[0].size()
	if size < 2<<20 {
		t.Fatalf("an answer of 4500 records takes %d bytes, which is no large one", size)
	}
	kept := 0
	for _, a := range all {
		if s.find(a.question) == a {
			kept++
		}
	}
	if kept == 0 || kept*size > maxLarge || s.bytes > maxLarge {
		t.Errorf("%d answers of %d bytes are kept, %d bytes in all", kept, size, s.bytes)
	}
	if last := all[len(all)-1]; s.find(last.question) != last {
		t.Error("the newest is not among them")
	}
	if s.find(upstream.QuestionOf(small)) == nil {
		t.Error("a small one is gone")
	}
}
