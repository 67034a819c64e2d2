package proxy

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics holds a proxy's metrics.
type metrics struct {
	frontends prometheus.Gauge
	seconds   *prometheus.HistogramVec
	behind    prometheus.Histogram
	entries   *prometheus.CounterVec
	errors    *prometheus.CounterVec
	ended     *prometheus.CounterVec
	forgetful prometheus.Gauge
}

// connects counts the outcomes of sockets at connect(). The kernel keeps the counters.
var connects = prometheus.NewDesc("fathom_service_connects_total",
	"Sockets that connected to a Service (connected), packets sent by unconnected sockets (sent), sockets refused because the Service has no endpoints (refused); "+
		"and sockets left to nftables: because the Service was changing, there is no room for another socket (full), its network namespace has used up its share, "+
		"the socket has sent to too many Services (socket), or it is one of the kernel's own, as below MPTCP (kernel).", []string{"fate"}, nil)

func newMetrics() *metrics {
	buckets := prometheus.ExponentialBuckets(0.0001, 2.5, 13) // 0.1 ms to 6 s
	return &metrics{
		frontends: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_service_frontends",
			Help: "Addresses and ports of Services that the kernel balances."}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fathom_service_apply_seconds", Buckets: buckets,
			Help: "Time to write Services to the kernel, changes only (change) or all (whole), or to compare them with it (compare)."}, []string{"what"}),
		behind: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_service_behind_seconds", Buckets: buckets,
			Help: "Time from an event of the API server to its effect on connections."}),
		entries: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_changes_total",
			Help: "Services changed (change), or entries in the kernel that were wrong (whole)."}, []string{"what"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_errors_total",
			Help: "Failed attempts to write Services to the kernel."}, []string{"what"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_service_flows_ended_total",
			Help: "Flows to removed endpoints, ended so that their clients reconnect: entries of connection tracking, sockets."}, []string{"what"}),
		forgetful: prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_service_affinity_full",
			Help: "Services with sessionAffinity for which nftables had no room to remember a client in the last minute."}),
	}
}

// applied records one attempt.
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
	c <- connects
}

// Collect implements prometheus.Collector.
func (p *Proxy) Collect(c chan<- prometheus.Metric) {
	for _, m := range p.counts.all() {
		m.Collect(c)
	}
	p.mu.Lock()
	connect := p.connect
	p.mu.Unlock()
	if connect == nil {
		return
	}
	fates, err := connect.Fates()
	if err != nil {
		return // closed concurrently
	}
	for _, f := range fates {
		c <- prometheus.MustNewConstMetric(connects, prometheus.CounterValue, float64(f.Times), f.Name)
	}
}

func (m *metrics) all() []prometheus.Collector {
	return []prometheus.Collector{m.frontends, m.seconds, m.behind, m.entries, m.errors, m.ended, m.forgetful}
}
