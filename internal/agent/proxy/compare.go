package proxy

import (
	"context"
	"time"
)

// compared is what a comparison of the kernel with what it should hold came to.
type compared struct {
	same bool
	err  error
	took time.Duration
}

// comparing is a comparison that goes on. To read what the kernel holds of 50,000 Services takes seconds, in which
// Services change: so the loop does not wait for it, and only if something is not as it should be, it sets everything.
type comparing struct {
	cancel context.CancelFunc
	result chan compared // has room for it
}

// compare begins a comparison, unless one goes on or there is nothing to compare.
func (p *Proxy) compare(ctx context.Context) {
	if p.comparing != nil || p.whole || p.kernel.failed || p.kernel.rules == nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &comparing{cancel, make(chan compared, 1)}
	p.comparing = c
	go func() {
		began := time.Now()
		same, err := p.kernel.holds(ctx)
		c.result <- compared{same, err, time.Since(began)}
	}()
}

// results is where the comparison that goes on tells its result; nil if there is none.
func (p *Proxy) results() <-chan compared {
	if p.comparing == nil {
		return nil
	}
	return p.comparing.result
}

// conclude takes a result, and asks for everything to be set unless all is as it should be.
func (p *Proxy) conclude(c compared) {
	p.comparing.cancel()
	p.comparing = nil
	p.counts.seconds.WithLabelValues("compare").Observe(c.took.Seconds())
	switch {
	case c.err != nil: // setting everything reads it as well, and says what is wrong
		p.Log.Warn("what the kernel holds of Services cannot be compared: all of it is set", "error", c.err)
	case !c.same:
		p.Log.Warn("what the kernel holds of Services is not what was put there: all of it is set")
	default:
		return
	}
	p.whole = true
}

// stopComparing ends the comparison that goes on, for what comes makes it pointless, or takes away what it reads by.
func (p *Proxy) stopComparing() {
	if p.comparing == nil {
		return
	}
	p.comparing.cancel()
	<-p.comparing.result
	p.comparing = nil
}
