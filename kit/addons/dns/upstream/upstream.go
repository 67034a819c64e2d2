// Package upstream asks the cluster's DNS servers on behalf of a node: over TCP, one question at a time however many
// want to know, and with bounds on how long anybody waits, on the questions and connections that there are at once, and
// on those of one client. CoreDNS's own plugin forward waits two seconds for a connection to a server that is gone, and
// goes on for five: as long as resolvers in pods wait themselves. Its max_concurrent bounds all clients together, so
// that one can have all of it.
package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/fathom-network/fathom/kit/addons/dns/share"
)

// How long things may take.
const (
	// dialTimeout is for a server in the same cluster: longer is lost.
	dialTimeout = 300 * time.Millisecond
	// hedgeAfter is when a question that nobody answers is asked again on a new connection, which leads to another of
	// the servers more often than not.
	hedgeAfter = 300 * time.Millisecond
	// flightTime is how long an answer is waited for as long as a server can be reached: it may have to ask others,
	// far away. Resolvers give up after five seconds.
	flightTime = 4500 * time.Millisecond
	// probeInterval is how often servers of which none could be reached are tried.
	probeInterval = 50 * time.Millisecond
	// idleTime is less than the ten seconds after which CoreDNS ends a connection without questions. lifeTime lets
	// servers that have come since take part.
	idleTime = 8 * time.Second
	lifeTime = 30 * time.Second
)

// How much there may be at once; of each, one client has half at most (package share). A question that nobody answers
// takes its connection, four goroutines and a few kilobytes for flightTime.
const (
	// maxFlights is for questions on their way. It is half of what a CoreDNS of kubeadm's configuration passes on at
	// once (max_concurrent 1000): one node does not take all of that. To servers that answer in 20 ms these are 25,000
	// questions a second.
	maxFlights = 512
	// maxHedges is for the further connections that a question is asked on again.
	maxHedges = 256
	// maxIdle is for connections that are kept for the next question.
	maxIdle = 64
)

// Question is what is asked, in the form in which equal ones are the same.
type Question struct {
	Name         string // lower case, absolute
	Type, Class  uint16
	RD, CD, AD   bool // flags of the header
	EDNS, DNSSEC bool // whether there is an OPT record, and its bit DO
}

// QuestionOf returns what a query asks.
func QuestionOf(r *dns.Msg) Question {
	q := r.Question[0]
	o := r.IsEdns0()
	return Question{
		Name: strings.ToLower(q.Name), Type: q.Qtype, Class: q.Qclass,
		RD: r.RecursionDesired, CD: r.CheckingDisabled, AD: r.AuthenticatedData,
		EDNS: o != nil, DNSSEC: o != nil && o.Do(),
	}
}

// msg is the query that asks it.
func (q Question) msg() *dns.Msg {
	m := &dns.Msg{Question: []dns.Question{{Name: q.Name, Qtype: q.Type, Qclass: q.Class}}}
	m.Id, m.RecursionDesired, m.CheckingDisabled, m.AuthenticatedData = dns.Id(), q.RD, q.CD, q.AD
	if q.EDNS {
		m.SetEdns0(dns.DefaultMsgSize, q.DNSSEC)
	}
	return m
}

// Upstream is the servers behind one address, such as a Service's.
type Upstream struct {
	addr           string
	places, hedges *share.Places // of maxFlights and maxHedges

	mu      sync.Mutex
	flights map[Question]*Flight
	idle    []*conn       // the one used last comes last
	gone    chan struct{} // closed while no server can be reached
	back    chan struct{} // closed while one can
	heard   time.Time     // when a server last answered, or took a connection
	pruning bool          // a timer for prune runs
	closed  bool
}

// New returns the upstream at HOST:PORT.
func New(addr string) *Upstream {
	u := &Upstream{
		addr: addr, places: share.New(maxFlights), hedges: share.New(maxHedges),
		flights: map[Question]*Flight{}, gone: make(chan struct{}), back: make(chan struct{}),
	}
	close(u.back)
	return u
}

// Close ends connections and attempts to make any.
func (u *Upstream) Close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	for _, c := range u.idle {
		_ = c.Close()
	}
	u.idle = nil
}

// Gone returns a channel that is closed while no server can be reached.
func (u *Upstream) Gone() <-chan struct{} {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.gone
}

// Flight is a question on its way.
type Flight struct {
	// Done is closed when Answer and Err are there.
	Done   chan struct{}
	Answer *dns.Msg // for reading
	Err    error
}

// Flights is the number of questions on their way. It takes no lock.
func (u *Upstream) Flights() int { return u.places.Taken() }

// Ask sends a question for a client, unless it is on its way already. landed is called with an answer before anyone who
// waits for the flight hears of it. The error is share.ErrClient or share.ErrAll: too much is on its way.
func (u *Upstream) Ask(q Question, client netip.Addr, landed func(*dns.Msg)) (*Flight, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.flights[q]; f != nil {
		return f, nil
	}
	if err := u.places.Take(client); err != nil {
		return nil, err
	}
	f := &Flight{Done: make(chan struct{})}
	u.flights[q] = f
	go func() {
		f.Answer, f.Err = u.fly(q, client)
		if f.Err == nil {
			landed(f.Answer)
		}
		u.mu.Lock()
		delete(u.flights, q)
		u.mu.Unlock()
		u.places.Leave(client)
		close(f.Done)
	}()
	return f, nil
}

// fly asks until there is an answer. Nearly always one comes soon, on a connection that is there: what all else takes,
// timers and goroutines, is made when it is needed.
func (u *Upstream) fly(q Question, client netip.Addr) (*dns.Msg, error) {
	m := q.msg()
	var silent *conn
	if c := u.take(); c != nil {
		answer, pending := u.quick(c, q, m)
		if answer != nil {
			return answer, nil
		}
		if pending {
			silent = c
		}
	}
	return u.insist(q, client, m, silent)
}

// quick asks once, on a connection that is there. pending says that the question is asked and nothing has come yet; where
// neither that is so nor there is an answer, the connection has ended.
func (u *Upstream) quick(c *conn, q Question, m *dns.Msg) (answer *dns.Msg, pending bool) {
	err := c.SetDeadline(time.Now().Add(hedgeAfter))
	if err == nil {
		err = c.WriteMsg(m)
	}
	if err == nil {
		if _, err = c.reader.Peek(1); errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, true
		}
	}
	if err == nil {
		answer, err = c.answer(q, m.Id)
	}
	if err != nil {
		_ = c.Close()
		return nil, false
	}
	u.put(c)
	return answer, false
}

// insist asks until there is an answer, on several connections if need be. On silent, if there is one, m was asked
// already. One connection is the question's own; each further one takes a place among the hedges, and if there is none
// the question waits for those that it has.
func (u *Upstream) insist(q Question, client netip.Addr, m *dns.Msg, silent *conn) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), flightTime-hedgeAfter)
	defer cancel() // ends the attempts that were not needed, and their connections
	type result struct {
		answer *dns.Msg
		err    error
		anew   bool
	}
	results := make(chan result)
	running := 0
	try := func(anew bool, ask func() (*dns.Msg, error)) {
		hedge := running > 0
		if hedge && u.hedges.Take(client) != nil {
			return
		}
		running++
		go func() {
			answer, err := ask()
			if hedge {
				u.hedges.Leave(client)
			}
			select {
			case results <- result{answer, err, anew}:
			case <-ctx.Done():
			}
		}()
	}
	attempt := func(anew bool) {
		try(anew, func() (*dns.Msg, error) { return u.exchange(ctx, q, m, anew) })
	}
	if silent != nil {
		try(false, func() (*dns.Msg, error) { return u.over(ctx, silent, q, m, true) })
	}
	attempt(silent != nil)
	again := time.NewTimer(hedgeAfter)
	defer again.Stop()
	err := errors.New("no answer")
	for {
		select {
		case r := <-results:
			running--
			if r.err == nil {
				if r.anew && running > 0 {
					u.drop() // what was silent has silent neighbours
				}
				return r.answer, nil
			}
			err = r.err
			if running > 0 {
				continue
			}
			if !u.waitBack(ctx) {
				return nil, fmt.Errorf("ask %s: %w", u.addr, err)
			}
			attempt(true)
		case <-again.C:
			if running < 3 {
				attempt(true)
			}
			again.Reset(2 * hedgeAfter)
		case <-ctx.Done():
			return nil, fmt.Errorf("ask %s: not within %v: %w", u.addr, flightTime, err)
		}
	}
}

// waitBack waits until a server can be reached.
func (u *Upstream) waitBack(ctx context.Context) bool {
	u.mu.Lock()
	back, closed := u.back, u.closed
	u.mu.Unlock()
	// A server that takes connections and ends them without an answer is not asked as fast as it can do that.
	pause := time.NewTimer(probeInterval)
	defer pause.Stop()
	select {
	case <-pause.C:
	case <-ctx.Done():
		return false
	}
	select {
	case <-back:
		return !closed
	case <-ctx.Done():
		return false
	}
}

// conn is a connection to a server.
type conn struct {
	dns.Conn
	reader     *bufio.Reader
	made, used time.Time
}

func newConn(c net.Conn) *conn {
	r := bufio.NewReaderSize(c, 2048)
	return &conn{Conn: dns.Conn{Conn: buffered{c, r}}, reader: r, made: time.Now()}
}

// buffered has the length of a message and the message read at once.
type buffered struct {
	net.Conn
	reader *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.reader.Read(p) }

// exchange asks once: on a connection that is there, or, if that has ended meanwhile, on a new one.
func (u *Upstream) exchange(ctx context.Context, q Question, m *dns.Msg, anew bool) (*dns.Msg, error) {
	if !anew {
		if c := u.take(); c != nil {
			if answer, err := u.over(ctx, c, q, m, false); err == nil || ctx.Err() != nil {
				return answer, err
			}
		}
	}
	c, err := u.dial(ctx)
	if err != nil {
		return nil, err
	}
	return u.over(ctx, c, q, m, false)
}

// over asks on a connection, unless that was done, and waits for the answer. If one comes the connection is kept.
func (u *Upstream) over(ctx context.Context, c *conn, q Question, m *dns.Msg, isAsked bool) (*dns.Msg, error) {
	err := c.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	if err == nil && !isAsked {
		err = c.WriteMsg(m)
	}
	var answer *dns.Msg
	if err == nil {
		answer, err = c.answer(q, m.Id)
	}
	if stop() && err == nil {
		u.put(c)
	} else {
		_ = c.Close()
	}
	return answer, err
}

// answer reads the answer to a question.
func (c *conn) answer(q Question, id uint16) (*dns.Msg, error) {
	for {
		answer, err := c.ReadMsg()
		if err != nil {
			return nil, err
		}
		if answer.Id != id {
			continue
		}
		if err := matches(q, answer); err != nil {
			return nil, err
		}
		return answer, nil
	}
}

// matches says whether a message answers a question.
func matches(q Question, answer *dns.Msg) error {
	if !answer.Response || len(answer.Question) != 1 {
		return errors.New("what came is no answer")
	}
	a := answer.Question[0]
	if !strings.EqualFold(a.Name, q.Name) || a.Qtype != q.Type || a.Qclass != q.Class {
		return fmt.Errorf("the answer is to another question, %s", a.String())
	}
	return nil
}

func (u *Upstream) take() *conn {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(u.idle) > 0 {
		c := u.idle[len(u.idle)-1]
		u.idle = u.idle[:len(u.idle)-1]
		if time.Since(c.used) < idleTime && time.Since(c.made) < lifeTime {
			return c
		}
		_ = c.Close()
	}
	return nil
}

func (u *Upstream) put(c *conn) {
	c.used = time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.heard = c.used
	if u.closed || len(u.idle) >= maxIdle || c.used.Sub(c.made) >= lifeTime {
		_ = c.Close()
		return
	}
	u.idle = append(u.idle, c)
	if !u.pruning {
		u.pruning = true
		time.AfterFunc(idleTime, u.prune)
	}
}

// prune ends connections that nobody has used for long, and comes again while there are others. The server has ended
// them, or will.
func (u *Upstream) prune() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.idle = slices.DeleteFunc(u.idle, func(c *conn) bool {
		old := time.Since(c.used) >= idleTime
		if old {
			_ = c.Close()
		}
		return old
	})
	u.pruning = len(u.idle) > 0
	if u.pruning {
		time.AfterFunc(idleTime, u.prune)
	}
}

// drop ends all connections that are kept.
func (u *Upstream) drop() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, c := range u.idle {
		_ = c.Close()
	}
	u.idle = nil
}

func (u *Upstream) dial(ctx context.Context) (*conn, error) {
	began := time.Now()
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "tcp", u.addr)
	if err != nil {
		if ctx.Err() == nil {
			u.lost(began)
		}
		return nil, err
	}
	u.found()
	return newConn(c), nil
}

// found notes that a server can be reached.
func (u *Upstream) found() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.heard = time.Now()
	select {
	case <-u.back:
	default:
		close(u.back)
		u.gone = make(chan struct{})
	}
}

// lost notes that none can, and looks for one from then on; began is when the attempt that failed did. If a server was
// heard since, it was one of several that is away, or this node was too busy to notice in time that it was not.
func (u *Upstream) lost(began time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.heard.After(began) {
		return
	}
	select {
	case <-u.gone:
		return // somebody looks already
	default:
	}
	close(u.gone)
	u.back = make(chan struct{})
	go u.probe()
}

// probe tries until a server can be reached.
func (u *Upstream) probe() {
	for {
		d := net.Dialer{Timeout: dialTimeout}
		c, err := d.Dial("tcp", u.addr)
		if err == nil {
			u.found()
			u.put(newConn(c))
			return
		}
		u.mu.Lock()
		closed := u.closed
		u.mu.Unlock()
		if closed {
			return
		}
		time.Sleep(probeInterval)
	}
}
