// Package nodecache is the plugin nodecache of CoreDNS: a node's cache of what the cluster's DNS servers say.
//
// Every answer that it gives is one that a server gave to this very question. It makes up none, not even that a name does
// not exist: what is below a name that does not exist, or in a namespace that there is not, may be there by a rule of
// the servers' configuration. docs/design/dns.md.
package nodecache

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/cache"
	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/upstream"
)

// How long answers are good for, at most, whatever their TTL says.
const (
	// clusterTTL is for names of the cluster, and denialTTL for all that do not exist: a Service that is made after
	// somebody asked for it is found so soon. Names that are asked for again are asked for before that.
	clusterTTL = 5 * time.Second
	denialTTL  = 5 * time.Second
	maxTTL     = 30 * time.Second
	// staleTime is how long an answer can stand in for one that nobody gives; staleTTL is for how long whoever gets it
	// may keep it.
	staleTime = time.Hour
	staleTTL  = 2
)

// How long a client waits.
const (
	// stalePatience is the time that the servers have if there is a stale answer to give instead.
	stalePatience = 400 * time.Millisecond
	// gonePatience is how long one without any waits while no server can be reached.
	gonePatience = 850 * time.Millisecond
	// failedPause is how long a question that the servers had no answer to is answered by a stale one at once.
	failedPause = time.Second
)

// size is how many answers are kept; one takes half a kilobyte to two.
const size = 20000

// NodeCache is the plugin.
type NodeCache struct {
	Next     plugin.Handler
	upstream *upstream.Upstream
	// search are the domains that resolvers of pods try after that of their own namespace, each absolute: svc.DOMAIN
	// first.
	search  []string
	answers *cache.Cache[*answer]
	now     func() time.Time
}

// New returns a cache of the servers at HOST:PORT, for pods with such a search list (without that of the namespace).
func New(addr string, search []string) *NodeCache {
	return &NodeCache{upstream: upstream.New(addr), search: search, answers: cache.New[*answer](size), now: time.Now}
}

// Name implements plugin.Handler.
func (*NodeCache) Name() string { return "nodecache" }

// Close ends connections to the servers.
func (c *NodeCache) Close() { c.upstream.Close() }

// errGone is what the log tells when a client gets no answer since nobody gives one.
var errGone = errors.New("none of the cluster's DNS servers can be reached, and no older answer is known")

// ServeDNS implements plugin.Handler.
func (c *NodeCache) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if r.Opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented, nil
	}
	q := upstream.QuestionOf(r)
	if q.Type == dns.TypeAXFR || q.Type == dns.TypeIXFR {
		return dns.RcodeRefused, nil
	}
	now := c.now()
	have := c.find(q)
	if have != nil && now.Before(have.until) {
		if have.wantsRefresh(now) {
			c.ask(q)
		}
		answersTotal.WithLabelValues("cache").Inc()
		return dns.RcodeSuccess, w.WriteMsg(have.reply(r, now))
	}
	if have != nil && now.After(have.until.Add(staleTime)) {
		have = nil
	}
	if have != nil {
		return c.serveOld(w, r, q, have, now)
	}
	return c.serveNew(w, r, q)
}

// serveOld answers anew if the servers do soon, and with an older answer otherwise.
func (c *NodeCache) serveOld(w dns.ResponseWriter, r *dns.Msg, q upstream.Question, have *answer, now time.Time) (int, error) {
	gone := c.upstream.Gone()
	if now.UnixNano()-have.failed.Load() > int64(failedPause) && !isClosed(gone) {
		f := c.ask(q)
		patience := time.NewTimer(stalePatience)
		defer patience.Stop()
		select {
		case <-f.Done:
			if f.Err == nil && conclusive(f.Answer) {
				answersTotal.WithLabelValues("upstream").Inc()
				return dns.RcodeSuccess, w.WriteMsg(newAnswer(q, f.Answer, now, c.limit(q)).reply(r, now))
			}
		case <-gone:
		case <-patience.C:
		}
		have.failed.Store(now.UnixNano())
	}
	answersTotal.WithLabelValues("stale").Inc()
	return dns.RcodeSuccess, w.WriteMsg(have.reply(r, now))
}

// serveNew waits for the servers, less long if none can be reached.
func (c *NodeCache) serveNew(w dns.ResponseWriter, r *dns.Msg, q upstream.Question) (int, error) {
	f := c.ask(q)
	patience := time.NewTimer(gonePatience)
	defer patience.Stop()
	select {
	case <-f.Done:
	case <-patience.C:
		select {
		case <-f.Done:
		case <-c.upstream.Gone(): // perhaps later than the patience ended
			answersTotal.WithLabelValues("none").Inc()
			return dns.RcodeServerFailure, errGone
		}
	}
	if f.Err != nil {
		answersTotal.WithLabelValues("none").Inc()
		return dns.RcodeServerFailure, f.Err
	}
	answersTotal.WithLabelValues("upstream").Inc()
	now := c.now()
	return dns.RcodeSuccess, w.WriteMsg(newAnswer(q, f.Answer, now, c.limit(q)).reply(r, now))
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// conclusive says whether a message tells what there is, and not that somebody could not find out.
func conclusive(m *dns.Msg) bool {
	return m.Rcode == dns.RcodeSuccess || m.Rcode == dns.RcodeNameError
}

// ask asks the servers and keeps what they say.
func (c *NodeCache) ask(q upstream.Question) *upstream.Flight { return c.fly(q, false) }

// fly asks the servers. follows says that nobody has asked for it yet, but that a search list makes it the next.
func (c *NodeCache) fly(q upstream.Question, follows bool) *upstream.Flight {
	return c.upstream.Ask(q, func(m *dns.Msg) {
		if before := c.find(q); before != nil {
			follows = follows || before.follows
		}
		c.keep(q, m, follows)
		if m.Rcode == dns.RcodeNameError && !follows {
			c.lookAhead(q)
		}
	})
}

// lookAhead asks for what a resolver asks next if the name was the first of its search list: the name below the other
// domains of the list, and the name itself. All at once, so that the resolver waits for the servers twice, and
// not once for each domain, and finds what it asks for on the node. If the name was no such thing, nothing is lost but
// these questions. What follows www.example.com.svc.DOMAIN, as if com were a namespace, is asked for only if that name
// came by itself.
func (c *NodeCache) lookAhead(q upstream.Question) {
	for _, name := range c.following(q) {
		next := q
		next.Name = name
		if have := c.find(next); have != nil && c.now().Before(have.until) {
			continue
		}
		lookaheadsTotal.Inc()
		c.fly(next, true)
	}
}

// following are the names that a resolver tries after this one.
func (c *NodeCache) following(q upstream.Question) []string {
	if len(c.search) == 0 || q.Type != dns.TypeA && q.Type != dns.TypeAAAA || q.Class != dns.ClassINET {
		return nil
	}
	rest, found := strings.CutSuffix(q.Name, "."+c.search[0])
	if !found {
		return nil
	}
	labels := dns.Split(rest + ".")
	if len(labels) < 2 {
		return nil // a namespace alone
	}
	name := rest[:labels[len(labels)-1]] // with the dot before the namespace
	var all []string
	for _, domain := range c.search {
		if _, ok := dns.IsDomainName(name + domain); ok {
			all = append(all, name+domain)
		}
	}
	return append(all, name)
}

// keep remembers a message, in the place of what was known before: the newest answer is the only one.
func (c *NodeCache) keep(q upstream.Question, m *dns.Msg, follows bool) {
	if !conclusive(m) || m.Truncated {
		return
	}
	if a := newAnswer(q, m, c.now(), c.limit(q)); a.until.After(a.since) {
		a.follows = follows
		c.answers.Add(hash(q), a)
	} else {
		c.answers.Remove(hash(q)) // it is not to be kept, and what was is not true any more
	}
}

// limit is how long an answer may be kept at most.
func (c *NodeCache) limit(q upstream.Question) time.Duration {
	if c.ofCluster(q.Name) {
		return clusterTTL
	}
	return maxTTL
}

// ofCluster says whether the cluster's own objects decide what a name means. Addresses of pods have names, too.
func (c *NodeCache) ofCluster(name string) bool {
	domains := []string{"in-addr.arpa.", "ip6.arpa."}
	if len(c.search) > 1 {
		domains = append(domains, c.search[1])
	}
	for _, d := range domains {
		if dns.IsSubDomain(d, name) {
			return true
		}
	}
	return false
}

func (c *NodeCache) find(q upstream.Question) *answer {
	a, found := c.answers.Get(hash(q))
	if !found || a.question != q {
		return nil
	}
	return a
}

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
