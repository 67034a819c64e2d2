package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands that have somebody outside the cluster ask all the time.
//
//	asks URL     ask every 50 ms from the lab's host, each time by a new connection
//	asked MAX    end that: the longest time between two answers was at most MAX
func init() {
	commands["asks"] = cmdAsks
	commands["asked"] = cmdAsked
}

// asker asks until it is ended.
type asker struct {
	url  string
	stop context.CancelFunc
	done sync.WaitGroup

	mu      sync.Mutex
	answers int
	last    time.Time // that there was an answer
	gap     time.Duration
}

const (
	askEvery    = 50 * time.Millisecond
	askPatience = 250 * time.Millisecond // a client that waits longer would find out later
)

func cmdAsks(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: asks URL")
	}
	s := sessionOf(ts)
	a := &asker{url: args[0], last: time.Now()}
	var ctx context.Context
	ctx, a.stop = context.WithCancel(context.Background())
	a.done.Go(func() { a.run(ctx) })
	s.asker = a
	s.closer = append(s.closer, a.end)
}

func (a *asker) end() {
	a.stop()
	a.done.Wait()
}

func (a *asker) run(ctx context.Context) {
	client := http.Client{Timeout: askPatience, Transport: &http.Transport{DisableKeepAlives: true}}
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// One that is not answered is no reason to ask the next one later.
		a.done.Go(func() {
			answer, err := client.Get(a.url)
			if err != nil {
				return
			}
			_, _ = io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
			a.mu.Lock()
			defer a.mu.Unlock()
			a.answers++
			a.gap, a.last = max(a.gap, time.Since(a.last)), time.Now()
		})
	}
}

func cmdAsked(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: asked MAX")
	}
	most := duration(ts, args[0])
	a := sessionOf(ts).asker
	a.end()
	a.gap = max(a.gap, time.Since(a.last))
	fmt.Fprintf(ts.Stdout(), "%d answers, at most %v apart\n", a.answers, a.gap.Round(time.Millisecond))
	if a.gap > most {
		ts.Fatalf("%s was not answered for %v", a.url, a.gap)
	}
}
