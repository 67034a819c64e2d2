package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/fathom-network/fathom/internal/lab"
)

// progress shows the steps of a command: a line for each when it ends and, on a terminal, the running steps
// below.
type progress struct {
	w     io.Writer
	width int // of the terminal; 0 when there is none
	start time.Time

	mu      sync.Mutex
	running []lab.Event
	ended   []lab.Event
	lines   int // of the live view, on the screen now
	stop    chan struct{}
	said    string
}

func newProgress(w *os.File) *progress {
	p := &progress{w: w, start: time.Now(), stop: make(chan struct{})}
	if term.IsTerminal(int(w.Fd())) && os.Getenv("TERM") != "dumb" {
		p.width, _, _ = term.GetSize(int(w.Fd()))
	}
	if p.width > 20 {
		go p.redraw()
	} else {
		p.width = 0
	}
	return p
}

func (p *progress) redraw() {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-tick.C:
			p.mu.Lock()
			p.erase()
			p.draw()
			p.mu.Unlock()
		}
	}
}

func (p *progress) report(e lab.Event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
	i := slices.IndexFunc(p.running, func(r lab.Event) bool {
		return r.Cluster == e.Cluster && r.Step == e.Step && r.Began.Equal(e.Began)
	})
	switch {
	case e.Ended.IsZero() && i < 0:
		p.running = append(p.running, e)
	case e.Ended.IsZero():
		p.running[i] = e
		if p.width == 0 && e.Detail != "" && e.Detail != p.said {
			fmt.Fprintf(p.w, "       %s%s: %s\n", prefix(e), e.Step, e.Detail)
			p.said = e.Detail
		}
	default:
		if i >= 0 {
			p.running = slices.Delete(p.running, i, i+1)
		}
		p.ended = append(p.ended, e)
		// A step that was cancelled because another failed is not reported.
		if !errors.Is(e.Err, context.Canceled) {
			mark := ""
			if e.Err != nil {
				mark = "  FAILED"
			}
			fmt.Fprintf(p.w, "%5.1fs %s%s%s\n", e.Ended.Sub(e.Began).Seconds(), prefix(e), e.Step, mark)
		}
	}
	p.draw()
}

func prefix(e lab.Event) string {
	if e.Cluster == "" {
		return ""
	}
	return e.Cluster + ": "
}

// erase removes the live view from the screen.
func (p *progress) erase() {
	if p.lines > 0 {
		fmt.Fprintf(p.w, "\x1b[%dA\x1b[J", p.lines)
		p.lines = 0
	}
}

func (p *progress) draw() {
	if p.width == 0 {
		return
	}
	for _, e := range p.running {
		line := fmt.Sprintf("%5.1fs %s%s …", time.Since(e.Began).Seconds(), prefix(e), e.Step)
		if e.Detail != "" {
			line += " " + e.Detail
		}
		if r := []rune(line); len(r) >= p.width {
			line = string(r[:p.width-1])
		}
		fmt.Fprintf(p.w, "\x1b[2m%s\x1b[0m\n", line)
		p.lines++
	}
}

// close ends the live view.
func (p *progress) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.stop)
	p.erase()
	p.width = 0
}

// timeline draws when each step began and ended.
func (p *progress) timeline(w io.Writer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ended) == 0 {
		return
	}
	const width = 50
	last := p.start
	for _, e := range p.ended {
		if e.Ended.After(last) {
			last = e.Ended
		}
	}
	total := max(last.Sub(p.start), time.Millisecond)
	steps := slices.Clone(p.ended)
	slices.SortStableFunc(steps, func(a, b lab.Event) int { return a.Began.Compare(b.Began) })
	fmt.Fprintf(w, "\n%-44s %7s %7s\n", "step", "begins", "takes")
	for _, e := range steps {
		from := int(e.Began.Sub(p.start) * width / total)
		to := max(from+1, int(e.Ended.Sub(p.start)*width/total))
		fmt.Fprintf(w, "%-44s %6.2fs %6.2fs |%s%s%s|\n", prefix(e)+e.Step, e.Began.Sub(p.start).Seconds(), e.Ended.Sub(e.Began).Seconds(),
			strings.Repeat(" ", min(from, width-1)), strings.Repeat("=", max(1, min(to, width)-min(from, width-1))), strings.Repeat(" ", max(0, width-to)))
	}
}
