package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// metrics are the agent's metrics; docs/install.md lists them.
type metrics struct {
	registry *prometheus.Registry
	passes   *prometheus.CounterVec
	seconds  prometheus.Histogram
	steps    *prometheus.HistogramVec
	last     prometheus.Gauge
	changes  *prometheus.CounterVec
	swept    *prometheus.CounterVec
	rebuilt  prometheus.Counter
	ended    prometheus.Counter
	repaired prometheus.Counter
	problems prometheus.Gauge
	leases   prometheus.Gauge
	refused  prometheus.Gauge
}

func newMetrics(node string) *metrics {
	labels := prometheus.Labels{"node": node}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		passes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_agent_passes_total", ConstLabels: labels,
			Help: "Passes over everything that the node should hold, by result."}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_agent_pass_seconds", ConstLabels: labels,
			Help: "What a pass takes.", Buckets: prometheus.ExponentialBuckets(0.0005, 2, 14)}),
		// Coarser than those of a pass: they are kept for each of the steps.
		steps: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fathom_agent_step_seconds", ConstLabels: labels,
			Help: "What a step of a pass takes.", Buckets: prometheus.ExponentialBuckets(0.0005, 4, 7)}, []string{"step"}),
		last: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_agent_last_good_pass_timestamp_seconds", ConstLabels: labels,
			Help: "When the node was last made what it should be."}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_agent_kernel_changes_total", ConstLabels: labels,
			Help: "What was changed in the kernel. Corrections and removals without a change of the API are drift."}, []string{"kind", "change"}),
		swept: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_agent_swept_total", ConstLabels: labels,
			Help: "What was taken back that its owner left: addresses of pods that are gone (lease)."}, []string{"what"}),
		rebuilt: prometheus.NewCounter(prometheus.CounterOpts{Name: "fathom_agent_leases_rebuilt_total", ConstLabels: labels,
			Help: "Leases of pods that are there which were lost, and made again of the pods' devices."}),
		ended: prometheus.NewCounter(prometheus.CounterOpts{Name: "fathom_agent_flows_ended_total", ConstLabels: labels,
			Help: "Flows of connection tracking that were of addresses which pods have given back."}),
		repaired: prometheus.NewCounter(prometheus.CounterOpts{Name: "fathom_agent_pods_repaired_total", ConstLabels: labels,
			Help: "Pods whose routes, neighbours or MTU were made right."}),
		problems: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_agent_problems", ConstLabels: labels,
			Help: "Problems at present; each is an event of the Node."}),
		leases: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_agent_leases", ConstLabels: labels,
			Help: "Pods that hold addresses of this node."}),
		refused: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_agent_refused_blocks", ConstLabels: labels,
			Help: "IPBlocks, of any node, that nobody uses since no IPPool bears them out: no agent makes such."}),
	}
	m.swept.WithLabelValues("lease")
	for _, s := range steps {
		m.steps.WithLabelValues(s.name)
	}
	for _, result := range []string{"success", "error"} {
		m.passes.WithLabelValues(result)
	}
	m.registry.MustRegister(m.passes, m.seconds, m.steps, m.last, m.changes, m.swept, m.rebuilt, m.ended, m.repaired, m.problems, m.leases, m.refused,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) passed(took time.Duration, err error) {
	m.seconds.Observe(took.Seconds())
	if err != nil {
		m.passes.WithLabelValues("error").Inc()
		return
	}
	m.passes.WithLabelValues("success").Inc()
	m.last.SetToCurrentTime()
}

func (m *metrics) stepped(step string, took time.Duration) {
	m.steps.WithLabelValues(step).Observe(took.Seconds())
}

func (m *metrics) changed(c podnet.Changes) {
	for kind, n := range map[string]diff.Count{"device": c.Tunnel, "address": c.Addrs, "route": c.Routes, "neighbour": c.Neighbours,
		"forward": c.Forwards, "sysctl": c.Sysctls, "masquerade": c.Masquerade, "guard": c.Guard} {
		m.count(kind, n)
	}
}

func (m *metrics) count(kind string, n diff.Count) {
	m.changes.WithLabelValues(kind, "added").Add(float64(n.Added))
	m.changes.WithLabelValues(kind, "corrected").Add(float64(n.Corrected))
	m.changes.WithLabelValues(kind, "removed").Add(float64(n.Removed))
}
