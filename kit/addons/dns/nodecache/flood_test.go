package nodecache

import (
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// flood is questions to which the servers are silent, each for another name, and all at once.
type flood struct {
	wg       sync.WaitGroup
	answered atomic.Int64
}

func startFlood(c *NodeCache, questions int, client func(int) net.IP) *flood {
	f := &flood{}
	for i := range questions {
		f.wg.Go(func() {
			resolveFor(c, client(i), fmt.Sprintf("n%d.silent.example.", i))
			f.answered.Add(1)
		})
	}
	return f
}

// TestFlood has one client ask 12,000 questions to which the servers are silent.
func TestFlood(t *testing.T) {
	s := newServers(t)
	s.set(func() {
		s.hushed = "silent.example."
		s.records["known.example."], s.records["old.example."] = "10.0.0.1", "10.0.0.2"
		for i := range 100 {
			s.records[fmt.Sprintf("new%d.example.", i)] = "10.0.0.3"
		}
	})
	c, k := newCache(t, s)
	expect(t, "before", resolve(c, "old.example."), "NOERROR 10.0.0.2 ttl 30")
	k.pass(maxTTL + time.Second)
	expect(t, "before", resolve(c, "known.example."), "NOERROR 10.0.0.1 ttl 30")
	goroutines := runtime.NumGoroutine()

	const questions, share = 12000, 256
	flooder, other := net.IPv4(10, 244, 0, 66), net.IPv4(10, 244, 0, 7)
	f := startFlood(c, questions, func(int) net.IP { return flooder })
	eventually(t, "what is beyond the client's share is answered", func() bool { return f.answered.Load() >= questions-share })
	if n := c.upstream.Flights(); n != share {
		t.Errorf("%d questions are on their way, want %d", n, share)
	}
	if n := resolveFor(c, flooder, "new0.example."); n != "SERVFAIL" {
		t.Errorf("one more question of the client: %s", n)
	}
	// What it knows already the client still gets, and what it knew once, at once
	expect(t, "what is known", resolveFor(c, flooder, "known.example."), "NOERROR 10.0.0.1 ttl 30")
	stale := resolveFor(c, flooder, "old.example.")
	expect(t, "what was known", stale, "NOERROR 10.0.0.2 ttl 2")
	// Nobody else notices
	for i := range 100 {
		name := fmt.Sprintf("new%d.example.", i)
		expect(t, name, resolveFor(c, other, name), "NOERROR 10.0.0.3 ttl 30")
	}
	expect(t, "what was known, to another", resolveFor(c, other, "old.example."), "NOERROR 10.0.0.2 ttl 30")
	// Each question on its way: the client's goroutine in this test, and four for up to three connections.
	if n := runtime.NumGoroutine() - goroutines; n > 3000 {
		t.Errorf("there are %d goroutines more", n)
	}
	if n := s.open(); n > 1000 {
		t.Errorf("there are %d connections to the servers", n)
	}
	f.wg.Wait()
	eventually(t, "nothing is left of it", func() bool { return c.waiting.Taken() == 0 && c.upstream.Flights() == 0 })
}

// TestFloodOfAddresses has 12,000 clients ask one question each: addresses that somebody made up, and whose share
// is therefore nothing. They can take all places, and no more memory than that; what is known is answered all the same.
func TestFloodOfAddresses(t *testing.T) {
	s := newServers(t)
	s.set(func() { s.hushed, s.records["known.example."] = "silent.example.", "10.0.0.1" })
	c, _ := newCache(t, s)
	expect(t, "before", resolve(c, "known.example."), "NOERROR 10.0.0.1 ttl 30")
	const questions, places = 12000, 512
	f := startFlood(c, questions, func(i int) net.IP { return net.IPv4(10, 1, byte(i>>8), byte(i)) })
	eventually(t, "what is beyond all places is answered", func() bool { return f.answered.Load() >= questions-places })
	expect(t, "what is known", resolve(c, "known.example."), "NOERROR 10.0.0.1 ttl 30")
	expect(t, "what is not", resolve(c, "new.example."), "SERVFAIL")
	if n := s.open(); n > 1000 {
		t.Errorf("there are %d connections to the servers", n)
	}
	f.wg.Wait()
	expect(t, "afterwards", resolve(c, "known.example."), "NOERROR 10.0.0.1 ttl 30")
}

// TestFloodOfOneName has a client ask the same again and again: one question to the servers, and many requests that wait.
func TestFloodOfOneName(t *testing.T) {
	s := newServers(t)
	s.set(func() { s.hushed, s.records["new.example."] = "silent.example.", "10.0.0.1" })
	c, _ := newCache(t, s)
	var wg sync.WaitGroup
	var answered, most atomic.Int64
	const requests, share = 5000, 512
	for range requests {
		wg.Go(func() {
			resolveFor(c, net.IPv4(10, 244, 0, 66), "www.silent.example.")
			most.Store(max(most.Load(), int64(c.waiting.Taken())))
			answered.Add(1)
		})
	}
	eventually(t, "what is beyond the client's share is answered", func() bool { return answered.Load() >= requests-share })
	expect(t, "another client", resolveFor(c, net.IPv4(10, 244, 0, 7), "new.example."), "NOERROR 10.0.0.1 ttl 30")
	if n := strings.Count(strings.Join(s.took(), " "), "www.silent."); n > 3 {
		t.Errorf("the servers were asked %d times", n)
	}
	if n := most.Load(); n != share {
		t.Errorf("%d requests waited, want %d", n, share)
	}
	wg.Wait()
}

// TestClose has those that wait get what there is when the cache ends.
func TestClose(t *testing.T) {
	s := newServers(t)
	s.set(func() { s.records["old.example."] = "10.0.0.1" })
	c, k := newCache(t, s)
	expect(t, "before", resolve(c, "old.example."), "NOERROR 10.0.0.1 ttl 30")
	k.pass(maxTTL + time.Second)
	s.set(func() { s.silent = true })
	var got [2]string
	var wg sync.WaitGroup
	wg.Go(func() { got[0] = resolve(c, "old.example.") })
	wg.Go(func() { got[1] = resolve(c, "new.example.") })
	eventually(t, "both wait", func() bool { return c.waiting.Taken() > 0 && c.upstream.Flights() == 2 })
	c.Close()
	wg.Wait()
	expect(t, "both", strings.Join(got[:], ", "), "NOERROR 10.0.0.1 ttl 2, SERVFAIL")
}
