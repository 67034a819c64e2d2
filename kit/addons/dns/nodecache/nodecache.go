// Package nodecache is the plugin nodecache of CoreDNS: a node's cache of what the cluster's DNS servers say.
//
// Every answer that it gives is one that a server gave to this very question. It makes up none, not even that a name does
// not exist: what is below a name that does not exist, or in a namespace that there is not, may be there by a rule of
// the servers' configuration. docs/design/dns.md.
package nodecache

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/kit/addons/dns/share"
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

// maxWaiting is how many requests may wait for the servers at once, whether they asked or somebody else did; one client's
// are half of them at most (package share). Each has a goroutine of about ten kilobytes.
const maxWaiting = 1024

// NodeCache is the plugin.
type NodeCache struct {
	Next     plugin.Handler
	upstream *upstream.Upstream
	// search are the domains that resolvers of pods try after that of their own namespace, each absolute: svc.DOMAIN
	// first, and then DOMAIN, the cluster's.
	search  []string
	answers *answers
	waiting *share.Places
	now     func() time.Time
	closing chan struct{}
	close   func()
	gauges  []prometheus.Collector
}

// New returns a cache of the servers at HOST:PORT, for pods with such a search list (without that of the namespace).
func New(addr string, search []string) *NodeCache {
	c := &NodeCache{
		upstream: upstream.New(addr), search: search, answers: newAnswers(), waiting: share.New(maxWaiting), now: time.Now,
		closing: make(chan struct{}),
	}
	c.close = sync.OnceFunc(func() {
		close(c.closing)
		c.upstream.Close()
		for _, g := range c.gauges {
			prometheus.Unregister(g)
		}
	})
	return c
}

// Name implements plugin.Handler.
func (*NodeCache) Name() string { return "nodecache" }

// Close ends connections to the servers, and gives who waits what there is: an older answer, or SERVFAIL. To let them
// wait on would be worse in an update: CoreDNS reads no further query, and keeps its socket, until the last is answered.
func (c *NodeCache) Close() { c.close() }

// What the log tells when a client gets no answer.
var (
	errGone    = errors.New("none of the cluster's DNS servers can be reached, and no older answer is known")
	errClosing = errors.New("this cache ends, and no older answer is known")
)

// ServeDNS implements plugin.Handler.
func (c *NodeCache) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if r.Opcode != dns.OpcodeQuery {
		return dns.RcodeNotImplemented, nil
	}
	if len(r.Question) != 1 {
		return dns.RcodeFormatError, nil // RFC 9619
	}
	q := upstream.QuestionOf(r)
	if q.Type == dns.TypeAXFR || q.Type == dns.TypeIXFR {
		return dns.RcodeRefused, nil
	}
	now := c.now()
	have := c.answers.find(q)
	if have != nil && now.Before(have.until) {
		if have.wantsRefresh(now) {
			_, _ = c.ask(q, share.Client(w.RemoteAddr())) // without room for it, whoever asks when it is too old does it
		}
		fromCache.Inc()
		return dns.RcodeSuccess, w.WriteMsg(have.reply(r, now))
	}
	if have != nil && now.After(have.until.Add(staleTime)) {
		have = nil
	}
	client := share.Client(w.RemoteAddr())
	if err := c.waiting.Take(client); err != nil {
		refused(overWaiting, err)
		if have != nil {
			return c.giveOld(w, r, have, now)
		}
		return c.giveNone(client, err)
	}
	defer c.waiting.Leave(client)
	if have != nil {
		return c.serveOld(w, r, q, have, now, client)
	}
	return c.serveNew(w, r, q, client)
}

// serveOld answers anew if the servers do soon, and with an older answer otherwise.
func (c *NodeCache) serveOld(w dns.ResponseWriter, r *dns.Msg, q upstream.Question, have *answer, now time.Time, client netip.Addr) (int, error) {
	gone := c.upstream.Gone()
	if now.UnixNano()-have.failed.Load() <= int64(failedPause) || isClosed(gone) {
		return c.giveOld(w, r, have, now)
	}
	f, err := c.ask(q, client)
	if err != nil {
		return c.giveOld(w, r, have, now)
	}
	patience := time.NewTimer(stalePatience)
	defer patience.Stop()
	select {
	case <-f.Done:
		if f.Err == nil && conclusive(f.Answer) {
			fromUpstream.Inc()
			return dns.RcodeSuccess, w.WriteMsg(newAnswer(q, f.Answer, now, c.limit(q)).reply(r, now))
		}
	case <-gone:
	case <-patience.C:
	case <-c.closing:
	}
	have.failed.Store(now.UnixNano())
	return c.giveOld(w, r, have, now)
}

// giveOld answers with what was true once.
func (c *NodeCache) giveOld(w dns.ResponseWriter, r *dns.Msg, have *answer, now time.Time) (int, error) {
	fromStale.Inc()
	return dns.RcodeSuccess, w.WriteMsg(have.reply(r, now))
}

// giveNone tells a client, and the log, why there is no answer.
func (c *NodeCache) giveNone(client netip.Addr, why error) (int, error) {
	fromNone.Inc()
	if errors.Is(why, share.ErrClient) || errors.Is(why, share.ErrAll) {
		why = fmt.Errorf("%s asks while too much waits for the servers: %w", client, why)
	}
	return dns.RcodeServerFailure, why
}

// serveNew waits for the servers, less long if none can be reached.
func (c *NodeCache) serveNew(w dns.ResponseWriter, r *dns.Msg, q upstream.Question, client netip.Addr) (int, error) {
	f, err := c.ask(q, client)
	if err != nil {
		return c.giveNone(client, err)
	}
	patience := time.NewTimer(gonePatience)
	defer patience.Stop()
	select {
	case <-f.Done:
	case <-c.closing:
		return c.giveNone(client, errClosing)
	case <-patience.C:
		select {
		case <-f.Done:
		case <-c.closing:
			return c.giveNone(client, errClosing)
		case <-c.upstream.Gone(): // perhaps later than the patience ended
			return c.giveNone(client, errGone)
		}
	}
	if f.Err != nil {
		return c.giveNone(client, f.Err)
	}
	fromUpstream.Inc()
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

// ask asks the servers for a client and keeps what they say. The error is share.ErrClient or share.ErrAll.
func (c *NodeCache) ask(q upstream.Question, client netip.Addr) (*upstream.Flight, error) {
	f, err := c.fly(q, client, false)
	if err != nil {
		refused(overQuestions, err)
	}
	return f, err
}

// fly asks the servers. follows says that nobody has asked for it yet, but that a search list makes it the next.
func (c *NodeCache) fly(q upstream.Question, client netip.Addr, follows bool) (*upstream.Flight, error) {
	return c.upstream.Ask(q, client, func(m *dns.Msg) {
		if before := c.answers.find(q); before != nil {
			follows = follows || before.follows
		}
		c.keep(q, m, follows)
		if !follows && c.deniedByCluster(m) {
			c.lookAhead(q, client)
		}
	})
}

// deniedByCluster says whether a message denies a name, and speaks for the cluster's domain. Where the servers' plugin
// kubernetes has a bare fallthrough, they ask somebody outside for what it does not know, and the SOA record is that
// one's.
func (c *NodeCache) deniedByCluster(m *dns.Msg) bool {
	if m.Rcode != dns.RcodeNameError || len(c.search) < 2 {
		return false
	}
	for _, rr := range m.Ns {
		if _, ok := rr.(*dns.SOA); ok {
			return dns.IsSubDomain(c.search[1], rr.Header().Name)
		}
	}
	return false
}

// lookAhead asks for what a resolver asks next if the name was the first of its search list, as far as it is a name of
// the cluster. All at once, so that the resolver waits for the servers once more, and not once for each domain. If
// the name was no such thing, nothing is lost but these questions. What follows www.example.com.svc.DOMAIN, as if com
// were a namespace, is asked for only if that name came by itself. They are on the client's account, and where there is
// no room for them they are left out.
func (c *NodeCache) lookAhead(q upstream.Question, client netip.Addr) {
	for _, name := range c.following(q) {
		next := q
		next.Name = name
		if have := c.answers.find(next); have != nil && c.now().Before(have.until) {
			continue
		}
		if _, err := c.fly(next, client, true); err != nil {
			return
		}
		lookaheadsTotal.Inc()
	}
}

// following are the names that a resolver tries after this one, without those that are not the cluster's. The servers pass
// those on, and who is outside learns what a pod asks for inside: billing.finance, if that is a Service, or passwrds, if
// somebody has misspelled one. A resolver that finds the Service does not ask for them, so nobody does before it.
func (c *NodeCache) following(q upstream.Question) []string {
	if len(c.search) < 2 || q.Type != dns.TypeA && q.Type != dns.TypeAAAA || q.Class != dns.ClassINET {
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
	for _, domain := range append(slices.Clone(c.search), "") {
		if _, ok := dns.IsDomainName(name + domain); ok && dns.IsSubDomain(c.search[1], name+domain) {
			all = append(all, name+domain)
		}
	}
	return all
}

// keep remembers a message, in the place of what was known before: the newest answer is the only one.
func (c *NodeCache) keep(q upstream.Question, m *dns.Msg, follows bool) {
	if !conclusive(m) || m.Truncated {
		return
	}
	if a := newAnswer(q, m, c.now(), c.limit(q)); a.until.After(a.since) {
		a.follows = follows
		c.answers.keep(a)
	} else {
		c.answers.drop(q) // it is not to be kept, and what was is not true any more
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
