package proxy

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a proxy counts.
type metrics struct {
	frontends prometheus.Gauge
	seconds   *prometheus.HistogramVec
	behind    prometheus.Histogram
	entries   *prometheus.CounterVec
	errors    *prometheus.CounterVec
	ended     *prometheus.CounterVec
}

func newMetrics() *metrics {
	buckets := prometheus.ExponentialBuckets(0.0001, 2.5, 13) // 0.1 ms to 6 s
	return &metrics{
		frontends: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_service_frontends",
			Help: "Addresses and ports of Services that the kernel balances."}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fathom_service_apply_seconds", Buckets: buckets,
			Help: "Time to put Services into the kernel, what has changed or the whole; or to compare them (compare), beside that."}, []string{"what"}),
		behind: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_service_behind_seconds", Buckets: buckets,
			Help: "Time from a change that the API server told of to its effect on connections."}),
		entries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_changes_total",
			Help: "Services changed (change), or entries of the kernel that were not as they should be (whole)."}, []string{"what"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_errors_total",
			Help: "Attempts to put Services into the kernel that failed."}, []string{"what"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_flows_ended_total",
			Help: "Flows to endpoints that are gone, ended so that their clients begin anew: entries of connection tracking, sockets."}, []string{"what"}),
	}
}

// applied counts one attempt.
func (m *metrics) applied(what string, heard, began time.Time, changed int, err error) {
	if err != nil {
		m.errors.WithLabelValues(what).Inc()
		return
	}
	m.seconds.WithLabelValues(what).Observe(time.Since(began).Seconds())
	m.entries.WithLabelValues(what).Add(float64(changed))
	if !heard.IsZero() {
		m.behind.Observe(time.Since(heard).Seconds())
	}
}

// Describe implements prometheus.Collector.
func (p *Proxy) Describe(c chan<- *prometheus.Desc) {
	for _, m := range p.counts.all() {
		m.Describe(c)
	}
}

// Collect implements prometheus.Collector.
func (p *Proxy) Collect(c chan<- prometheus.Metric) {
	for _, m := range p.counts.all() {
		m.Collect(c)
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.frontends, m.seconds, m.behind, m.entries, m.errors, m.ended}
}
