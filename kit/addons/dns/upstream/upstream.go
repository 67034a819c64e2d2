// Package upstream asks the cluster's DNS servers on behalf of a node: over TCP, one question at a time however many
// want to know, and with a bound on how long anybody waits. CoreDNS's own plugin forward waits two seconds for a
// connection to a server that is gone, and goes on for five: as long as resolvers in pods wait themselves.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
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
	addr string

	mu      sync.Mutex
	flights map[Question]*Flight
	idle    []*conn       // the one used last comes last
	gone    chan struct{} // closed while no server can be reached
	back    chan struct{} // closed while one can
	pruning bool          // a timer for prune runs
	closed  bool
}

// New returns the upstream at HOST:PORT.
func New(addr string) *Upstream {
	u := &Upstream{addr: addr, flights: map[Question]*Flight{}, gone: make(chan struct{}), back: make(chan struct{})}
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

// Ask sends a question, unless it is on its way already. landed is called with an answer before anyone who waits for
// the flight hears of it.
func (u *Upstream) Ask(q Question, landed func(*dns.Msg)) *Flight {
	u.mu.Lock()
	defer u.mu.Unlock()
	if f := u.flights[q]; f != nil {
		return f
	}
	f := &Flight{Done: make(chan struct{})}
	u.flights[q] = f
	go func() {
		f.Answer, f.Err = u.fly(q)
		if f.Err == nil {
			landed(f.Answer)
		}
		u.mu.Lock()
		delete(u.flights, q)
		u.mu.Unlock()
		close(f.Done)
	}()
	return f
}

// fly asks until there is an answer.
func (u *Upstream) fly(q Question) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(context.Background(), flightTime)
	defer cancel() // ends the attempts that were not needed, and their connections
	type result struct {
		answer *dns.Msg
		err    error
		anew   bool
	}
	results := make(chan result)
	running := 0
	attempt := func(anew bool) {
		running++
		go func() {
			answer, err := u.exchange(ctx, q, anew)
			select {
			case results <- result{answer, err, anew}:
			case <-ctx.Done():
			}
		}()
	}
	attempt(false)
	hedge := time.NewTimer(hedgeAfter)
	defer hedge.Stop()
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
		case <-hedge.C:
			if running < 3 {
				attempt(true)
			}
			hedge.Reset(2 * hedgeAfter)
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
	made, used time.Time
}

// exchange asks once: on a connection that is there, or, if that has ended meanwhile, on a new one.
func (u *Upstream) exchange(ctx context.Context, q Question, anew bool) (*dns.Msg, error) {
	if !anew {
		if c := u.take(); c != nil {
			if answer, err := u.over(ctx, c, q); err == nil || ctx.Err() != nil {
				return answer, err
			}
		}
	}
	c, err := u.dial(ctx)
	if err != nil {
		return nil, err
	}
	return u.over(ctx, c, q)
}

// over asks on a connection, which is kept if that went well.
func (u *Upstream) over(ctx context.Context, c *conn, q Question) (*dns.Msg, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	m := q.msg()
	err := c.WriteMsg(m)
	for err == nil {
		var answer *dns.Msg
		answer, err = c.ReadMsg()
		if err != nil || answer.Id != m.Id {
			continue
		}
		if err = matches(q, answer); err != nil {
			break
		}
		if stop() {
			u.put(c)
		} else {
			_ = c.Close()
		}
		return answer, nil
	}
	stop()
	_ = c.Close()
	return nil, err
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

// maxIdle bounds the connections that are kept.
const maxIdle = 64

func (u *Upstream) put(c *conn) {
	c.used = time.Now()
	u.mu.Lock()
	defer u.mu.Unlock()
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
	d := net.Dialer{Timeout: dialTimeout}
	c, err := d.DialContext(ctx, "tcp", u.addr)
	if err != nil {
		if ctx.Err() == nil {
			u.lost()
		}
		return nil, err
	}
	u.found()
	return &conn{Conn: dns.Conn{Conn: c}, made: time.Now()}, nil
}

// found notes that a server can be reached.
func (u *Upstream) found() {
	u.mu.Lock()
	defer u.mu.Unlock()
	select {
	case <-u.back:
	default:
		close(u.back)
		u.gone = make(chan struct{})
	}
}

// lost notes that none can, and looks for one from then on.
func (u *Upstream) lost() {
	u.mu.Lock()
	defer u.mu.Unlock()
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
			u.put(&conn{Conn: dns.Conn{Conn: c}, made: time.Now()})
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
