package proxy

import (
	"context"
	"time"
)

// compared is the result of comparing the kernel with the plan.
type compared struct {
	same bool
	err  error
	took time.Duration
}

// comparing is a comparison in progress. Reading 50,000 Services back from the kernel takes seconds, in which Services
// change. So the loop does not wait for it, and sets everything only if the comparison finds a difference.
type comparing struct {
	cancel context.CancelFunc
	result chan compared // buffered: the comparison never blocks on it
}

// compare starts a comparison, unless one is running or there is nothing to compare.
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

// results returns the channel of the running comparison's result, or nil if none is running.
func (p *Proxy) results() <-chan compared {
	if p.comparing == nil {
		return nil
	}
	return p.comparing.result
}

// conclude takes the result of a comparison. It requests a full set if the kernel differs or could not be read.
func (p *Proxy) conclude(c compared) {
	p.comparing.cancel()
	p.comparing = nil
	p.counts.seconds.WithLabelValues("compare").Observe(c.took.Seconds())
	switch {
	case c.err != nil: // a full set reads the kernel as well, and reports the error
		p.Log.Warn("cannot compare the kernel's Services; setting all of them", "error", c.err)
	case !c.same:
		p.Log.Warn("the kernel's Services differ from what was set; setting all of them")
	default:
		return
	}
	p.whole = true
}

// stopComparing cancels the running comparison: the next step makes its result useless, or closes what it reads with.
func (p *Proxy) stopComparing() {
	if p.comparing == nil {
		return
	}
	p.comparing.cancel()
	<-p.comparing.result
	p.comparing = nil
}
