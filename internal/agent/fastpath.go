package agent

import (
	"errors"
	"fmt"
	"reflect"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// What --fast-path says against the configuration.
const (
	FastPathAuto = "auto"
	FastPathOff  = "off"
)

// fastPath is the node's fast path. Its zero value is not opened yet.
type fastPath struct {
	mu     sync.Mutex // the loop sets it, others read it back
	path   *fastpath.Path
	plan   fastpath.Plan
	failed error  // why it could not be opened
	was    error  // result of the last set
	told   string // the last logged reason why the kernel has none
	reason string // why packets take the stack; empty if they do not
}

// setFastPath sets the fast path for the routes of the plan. It compares the kernel if look is set or the plan has changed; most
// events of the API cause neither.
func (a *Agent) setFastPath(plan podnet.Plan, underlay []podnet.Interface, look bool) error {
	on := a.config.FastPath
	if a.FastPath != "" {
		on = a.FastPath == FastPathAuto
	}
	if judge := a.fast.open(a.node, a.Paths.BPF, look); judge != nil {
		a.policies.SetFastPath(judge)
	} else {
		a.policies.SetFastPath(nil)
	}
	free, known := a.policies.Free()
	if !known { // pods that policies isolate are to stay where they are
		return nil
	}
	changes, err := a.fast.set(fastpath.Plan{Fast: on, Ways: plan.Ways(underlay), Free: free}, look)
	for kind, n := range map[string]diff.Count{"program": changes.Programs, "fastpod": changes.Pods, "fastroute": changes.Remotes} {
		a.metrics.count(kind, n)
	}
	if changes.Total() > 0 {
		a.Log.Info("fast path", "changes", changes.String())
	}
	var unsupported *bpf.UnsupportedError
	if errors.As(err, &unsupported) && a.FastPath != FastPathAuto {
		if a.fast.told != unsupported.Error() { // logged once: it is no fault of the node
			a.fast.told = unsupported.Error()
			a.Log.Info("fast path", "none", unsupported.Error())
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("set the fast path: %w", err)
	}
	return nil
}

// set makes the fast path follow the plan. Without it every packet takes the stack, so a failure does not make the node unready.
func (f *fastPath) set(plan fastpath.Plan, look bool) (changes fastpath.Changes, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !look && reflect.DeepEqual(plan, f.plan) {
		return fastpath.Changes{}, f.was
	}
	defer func() { f.plan, f.was = plan, err }()
	if f.path == nil {
		return fastpath.Changes{}, f.failed
	}
	if !look && f.was == nil && len(f.plan.Devices) > 0 {
		if changes, followed, err := f.path.Follow(f.plan, plan); followed {
			return changes, err
		}
	}
	f.reason = ""
	if possible, why := f.path.Fast(); !plan.Fast {
		f.reason = "it is switched off"
	} else if !possible {
		f.reason = why
	}
	return f.path.Set(plan)
}

// open loads the programs, of which packets notice nothing until set, and returns what they know of policies, nil if the kernel has none of them. It tries
// once, and again if look is set.
func (f *fastPath) open(node *link.Namespace, dir string, look bool) *fastpath.Policies {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path == nil && (look || f.failed == nil) {
		if f.path, f.failed = fastpath.Open(node, fastpath.Options{Dir: dir}); f.failed != nil {
			f.reason = f.failed.Error()
		}
	}
	if f.path == nil {
		return nil
	}
	return f.path.Policies()
}

// state reads the fast path back from the kernel.
func (f *fastPath) state() (answer.FastPath, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := answer.FastPath{Reason: f.reason}
	if f.path == nil {
		return s, nil
	}
	s.On = f.reason == ""
	var err error
	if s.Slow, s.Judged, err = f.path.Slow(); err != nil {
		return s, err
	}
	differences, err := f.path.Check(f.plan)
	if err != nil {
		return s, err
	}
	for _, d := range differences {
		s.Differences = append(s.Differences, d.String())
	}
	return s, nil
}

func (f *fastPath) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path != nil {
		f.path.Close()
		f.path = nil
	}
}

var packets = prometheus.NewDesc("fathom_fastpath_packets_total",
	"Packets of pods by what became of them: redirected past the stack, left to the stack, dropped; and why.",
	[]string{"verdict", "reason"}, nil)

// Describe implements prometheus.Collector.
func (f *fastPath) Describe(c chan<- *prometheus.Desc) { c <- packets }

// Collect implements prometheus.Collector. The kernel counts.
func (f *fastPath) Collect(c chan<- prometheus.Metric) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.path == nil {
		return
	}
	counts, err := f.path.Counts()
	if err != nil {
		c <- prometheus.NewInvalidMetric(packets, err)
		return
	}
	for _, n := range counts {
		c <- prometheus.MustNewConstMetric(packets, prometheus.CounterValue, float64(n.Packets), n.Verdict, n.Reason)
	}
}
