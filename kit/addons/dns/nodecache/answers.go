package nodecache

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin/pkg/cache"
	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/upstream"
)

// How much is kept.
const (
	// maxAnswers is how many answers are kept at most, of which most take half a kilobyte to two.
	maxAnswers = 20000
	// smallAnswer is the memory that an answer may take without being counted. So all small ones take 40 MB at most.
	smallAnswer = 2 << 10
	// maxLarge is the memory that all others may take together. A message of 64 KiB can become three megabytes, for a
	// name of 255 bytes is two when it is compressed: whose domain it is could fill a node's memory with such.
	maxLarge = 16 << 20
)

// answers are what is kept, by their questions.
type answers struct {
	kept *cache.Cache[*answer]

	mu    sync.Mutex
	large []*answer // in the order in which they came; those that others have replaced stay until it is their turn
	bytes int       // of large
}

func newAnswers() *answers { return &answers{kept: cache.New[*answer](maxAnswers)} }

// find returns the answer to a question, however old, or nil.
func (s *answers) find(q upstream.Question) *answer {
	a, found := s.kept.Get(hash(q))
	if !found || a.question != q {
		return nil
	}
	return a
}

// keep puts an answer in the place of what there is to its question. If it is large, the oldest large ones make room.
func (s *answers) keep(a *answer) {
	size := a.size()
	if size > maxLarge/4 {
		s.drop(a.question) // what was true is so no more
		return
	}
	s.kept.Add(hash(a.question), a)
	if size <= smallAnswer {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.large = append(s.large, a)
	s.bytes += size
	for s.bytes > maxLarge {
		oldest := s.large[0]
		s.large[0] = nil
		s.large = s.large[1:]
		s.bytes -= oldest.size()
		if s.find(oldest.question) == oldest {
			s.drop(oldest.question)
		}
	}
}

// drop forgets the answer to a question.
func (s *answers) drop(q upstream.Question) { s.kept.Remove(hash(q)) }

// hash is the number that an answer is kept by (FNV-1a).
func hash(q upstream.Question) uint64 {
	h := uint64(14695981039346656037)
	add := func(b byte) { h = (h ^ uint64(b)) * 1099511628211 }
	for i := range len(q.Name) {
		add(q.Name[i])
	}
	for _, n := range []uint16{q.Type, q.Class} {
		add(byte(n))
		add(byte(n >> 8))
	}
	for _, flag := range []bool{q.RD, q.CD, q.AD, q.EDNS, q.DNSSEC} {
		if flag {
			add(1)
		} else {
			add(0)
		}
	}
	return h
}

// answer is what a server said.
type answer struct {
	question     upstream.Question
	msg          *dns.Msg // for reading
	since, until time.Time
	follows      bool // it is one of a search list, and not the first
	hits         atomic.Int64
	refreshed    atomic.Bool  // whether it was asked for again
	failed       atomic.Int64 // when that last led to nothing, in nanoseconds since 1970
}

// newAnswer makes one of a message, good for the TTL that it has and no longer than the limit.
func newAnswer(q upstream.Question, m *dns.Msg, now time.Time, limit time.Duration) *answer {
	return &answer{question: q, msg: m, since: now, until: now.Add(min(limit, lifetime(m)))}
}

// lifetime is how long a message may be kept. A denial's is what its SOA record says, and without one none (RFC 2308,
// section 5).
func lifetime(m *dns.Msg) time.Duration {
	least, denial := int64(-1), m.Rcode == dns.RcodeNameError || !answersType(m)
	soa := false
	for _, records := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range records {
			h := rr.Header()
			if h.Rrtype == dns.TypeOPT {
				continue
			}
			ttl := int64(h.Ttl)
			if s, ok := rr.(*dns.SOA); ok && denial {
				ttl, soa = min(ttl, int64(s.Minttl)), true
			}
			if least < 0 || ttl < least {
				least = ttl
			}
		}
	}
	switch d := time.Duration(least) * time.Second; {
	case least < 0 || denial && !soa:
		return 0
	case denial:
		return min(d, denialTTL)
	default:
		return d
	}
}

// answersType says whether there is a record of the type that was asked for.
func answersType(m *dns.Msg) bool {
	for _, rr := range m.Answer {
		if t := rr.Header().Rrtype; t == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY {
			return true
		}
	}
	return false
}

// wantsRefresh says, once, that an answer that is in use will soon be too old.
func (a *answer) wantsRefresh(now time.Time) bool {
	if a.hits.Add(1) < 2 || a.until.Sub(now) > a.until.Sub(a.since)/4 {
		return false
	}
	return a.refreshed.CompareAndSwap(false, true)
}

// reply is the answer to a client, with the time that has passed taken off.
func (a *answer) reply(r *dns.Msg, now time.Time) *dns.Msg {
	m := a.msg.Copy()
	m.Id, m.Question = r.Id, r.Question
	if !a.question.AD && !a.question.DNSSEC {
		m.AuthenticatedData = false
	}
	left := uint32(staleTTL)
	if now.Before(a.until) {
		left = uint32((a.until.Sub(now) + time.Second - 1) / time.Second)
	}
	for _, records := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range records {
			if h := rr.Header(); h.Rrtype != dns.TypeOPT {
				h.Ttl = min(h.Ttl, left)
			}
		}
	}
	// The server puts in what this client can take.
	m.Extra = withoutOPT(m.Extra)
	return m
}

func withoutOPT(records []dns.RR) []dns.RR {
	kept := records[:0]
	for _, rr := range records {
		if rr.Header().Rrtype != dns.TypeOPT {
			kept = append(kept, rr)
		}
	}
	return kept
}

// size is about how many bytes of memory the answer takes: its message's on the wire without compression, which has
// each name as often as the memory, and the records' headers.
func (a *answer) size() int {
	const record = 96 // an interface, a header without its name, and what a slice or string of data has around it
	m := a.msg
	return 256 + m.Len() + record*(len(m.Answer)+len(m.Ns)+len(m.Extra))
}
