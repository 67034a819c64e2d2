package nodecache

import (
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/upstream"
)

// captures reads the messages that resolvers and servers really sent (testdata/*.hex, one a line; what each is says the
// comment before it), and has them as seeds.
func captures(f *testing.F, file string) {
	f.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		data, err := hex.DecodeString(line)
		if err != nil {
			f.Fatal(err)
		}
		if err := new(dns.Msg).Unpack(data); err != nil {
			f.Fatalf("%s: %v", line, err)
		}
		f.Add(data)
	}
}

// FuzzQuery has a client send anything: it gets an answer to what it asked, or an error, and what the servers are asked
// is a query that says the same.
func FuzzQuery(f *testing.F) {
	captures(f, "queries.hex")
	c := New("127.0.0.1:1", []string{"svc.cluster.local.", "cluster.local.", "corp.example."})
	f.Cleanup(c.Close)
	f.Fuzz(func(t *testing.T, data []byte) {
		r := new(dns.Msg)
		if err := r.Unpack(data); err != nil || len(r.Question) != 1 {
			return // the library's server answers those, or CoreDNS's
		}
		q := upstream.QuestionOf(r)
		for _, name := range c.following(q) {
			if _, ok := dns.IsDomainName(name); !ok || !dns.IsFqdn(name) {
				t.Errorf("after %q comes %q, which is no name", q.Name, name)
			}
		}
		if n := len(c.following(q)); n > len(c.search)+1 {
			t.Errorf("%d names come after %q", n, q.Name)
		}
		// As if the servers had said that there is no such name, so that nobody is asked.
		denial := new(dns.Msg).SetRcode(r, dns.RcodeNameError)
		denial.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 30}, Ns: "ns.", Mbox: "m.", Minttl: 30}}
		c.keep(q, denial, true)
		w := &writer{client: net.IPv4(10, 0, 0, 1)}
		rcode, err := c.ServeDNS(t.Context(), w, r)
		if (w.msg == nil) == (rcode == dns.RcodeSuccess) || err != nil {
			t.Fatalf("rcode %d, error %v, answer %v", rcode, err, w.msg)
		}
		if w.msg != nil && (w.msg.Id != r.Id || w.msg.Question[0] != r.Question[0] || w.msg.Rcode != dns.RcodeNameError) {
			t.Errorf("%v is answered by %v", r, w.msg)
		}
	})
}

// FuzzAnswer has a server say anything to a question: what becomes of it has an end, a size that covers what it holds,
// and is itself a message.
func FuzzAnswer(f *testing.F) {
	captures(f, "answers.hex")
	now := time.Unix(1e9, 0)
	f.Fuzz(func(t *testing.T, data []byte) {
		m := new(dns.Msg)
		if err := m.Unpack(data); err != nil || !m.Response || len(m.Question) != 1 {
			return // upstream gives no such thing: FuzzRead
		}
		r := new(dns.Msg)
		r.Id, r.Question = m.Id+1, m.Question
		q := upstream.QuestionOf(r)
		a := newAnswer(q, m, now, maxTTL)
		kept := a.until.Sub(now)
		if kept < 0 || kept > maxTTL || m.Rcode == dns.RcodeNameError && kept > denialTTL {
			t.Errorf("it is kept for %v", kept)
		}
		if least := len(m.Answer) + len(m.Ns) + len(m.Extra); a.size() < 64*least {
			t.Errorf("%d records take %d bytes", least, a.size())
		}
		for _, age := range []time.Duration{0, kept / 2, staleTime} {
			reply := a.reply(r, now.Add(age))
			if reply.Id != r.Id || reply.Rcode != m.Rcode || len(reply.Answer) > len(m.Answer) {
				t.Errorf("%v becomes %v", m, reply)
			}
			for _, rr := range reply.Answer {
				if ttl := rr.Header().Ttl; rr.Header().Rrtype != dns.TypeOPT && ttl > uint32(max(maxTTL/time.Second, staleTTL)) {
					t.Errorf("a client may keep %v for %d s", rr, ttl)
				}
			}
		}
		s := newAnswers()
		s.keep(a)
		if have := s.find(q); have != a && a.size() <= maxLarge/4 {
			t.Errorf("it is not kept: %v", have)
		}
	})
}
