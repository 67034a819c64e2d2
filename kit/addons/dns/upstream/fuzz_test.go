package upstream

import (
	"encoding/binary"
	"encoding/hex"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// FuzzRead has a server send anything over its connection: it is an answer to the question, or an error.
func FuzzRead(f *testing.F) {
	text, err := os.ReadFile("../nodecache/testdata/answers.hex")
	if err != nil {
		f.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		data, err := hex.DecodeString(line)
		if err != nil {
			f.Fatal(err)
		}
		stream := append(binary.BigEndian.AppendUint16(nil, uint16(len(data))), data...)
		f.Add(stream)
		f.Add(append(stream, stream...))
		f.Add(stream[:len(stream)-1])
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) < 4 {
			return
		}
		// The question is the one that the first message answers, so that some are right.
		q := Question{Name: "www.example.com.", Type: dns.TypeA, Class: dns.ClassINET}
		id := binary.BigEndian.Uint16(stream[2:])
		first := new(dns.Msg)
		if err := first.Unpack(stream[2:]); err == nil && len(first.Question) == 1 {
			q = QuestionOf(first)
		}
		server, client := net.Pipe()
		go func() {
			_, _ = server.Write(stream)
			_ = server.Close()
		}()
		defer client.Close()
		_ = client.SetDeadline(time.Now().Add(10 * time.Second))
		m, err := newConn(client).answer(q, id)
		if (m == nil) == (err == nil) {
			t.Fatalf("both or neither of answer and error: %v, %v", m, err)
		}
		if err == nil && (m.Id != id || !m.Response || !strings.EqualFold(m.Question[0].Name, q.Name) || m.Question[0].Qtype != q.Type) {
			t.Errorf("%v is no answer to %v", m, q)
		}
	})
}

// FuzzQuestion has a client ask anything: what servers are asked is a message, and means the same question.
func FuzzQuestion(f *testing.F) {
	f.Add("www.example.com.", dns.TypeA, uint16(dns.ClassINET), true, false, false, true, false)
	f.Add(`a\.b.\000.`, dns.TypeTXT, uint16(dns.ClassCHAOS), false, true, true, true, true)
	f.Fuzz(func(t *testing.T, name string, kind, class uint16, rd, cd, ad, edns, do bool) {
		r := &dns.Msg{Question: []dns.Question{{Name: name, Qtype: kind, Qclass: class}}}
		r.RecursionDesired, r.CheckingDisabled, r.AuthenticatedData = rd, cd, ad
		if edns {
			r.SetEdns0(1232, do)
		}
		wire, err := r.Pack()
		if err != nil {
			return
		}
		if err := r.Unpack(wire); err != nil {
			return
		}
		q := QuestionOf(r)
		wire, err = q.msg().Pack()
		if err != nil {
			t.Fatalf("%+v cannot be asked: %v", q, err)
		}
		asked := new(dns.Msg)
		if err := asked.Unpack(wire); err != nil {
			t.Fatalf("%+v cannot be read: %v", q, err)
		}
		if got := QuestionOf(asked); got != q {
			t.Errorf("asked %+v, want %+v", got, q)
		}
	})
}
