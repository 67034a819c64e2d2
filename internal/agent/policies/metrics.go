package policies

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
)

// metrics are a Keeper's metrics; docs/policy.md lists them.
type metrics struct {
	seconds, waited prometheus.Histogram
	rechecks        prometheus.Histogram
	ended           prometheus.Counter
	changes         *prometheus.CounterVec
	recorded        *prometheus.CounterVec
	lost            prometheus.Counter
	labelled        map[string]bool // policies that have a label of their own; record's alone
	number          *prometheus.Desc
	flows, leftOut  *prometheus.Desc
}

func newMetrics() *metrics {
	buckets := prometheus.ExponentialBuckets(0.0005, 2, 14)
	return &metrics{
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_policy_apply_seconds", Buckets: buckets,
			Help: "What it takes to bring a change of policies, namespaces or pods to the kernel."}),
		waited: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_policy_pod_wait_seconds", Buckets: buckets,
			Help: "How long the attachment of a pod waited until the pod's policies were in the kernel."}),
		rechecks: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "fathom_policy_recheck_seconds", Buckets: buckets,
			Help: "What it takes to look at all connections that are there, after a change."}),
		ended: prometheus.NewCounter(prometheus.CounterOpts{Name: "fathom_policy_connections_forbidden_total",
			Help: "Connections that were there when a policy began to forbid them."}),
		changes: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_policy_set_elements_total",
			Help: "Elements of the table of policies that were changed when all of it was set: at the start, after an error, and where the kernel held something else."}, []string{"change"}),
		recorded: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_policy_packets_total",
			Help: "Packets that begin a connection and were recorded, by what became of them and by each policy that decides: all that are dropped, unless a source sends very many, and a sample of those accepted."}, []string{"policy", "direction", "verdict"}),
		lost: prometheus.NewCounter(prometheus.CounterOpts{Name: "fathom_policy_packets_lost_total",
			Help: "Packets that were to be recorded, and came faster than they could be read."}),
		labelled: map[string]bool{},
		flows:    prometheus.NewDesc("fathom_policy_flows", "Connections that the fast path has judged and remembers, when they were looked at last.", nil, nil),
		leftOut:  prometheus.NewDesc("fathom_policy_fastpath_left_out", "Elements that did not fit into the fast path's maps: what they allow, the kernel's rules do.", nil, nil),
		number:   prometheus.NewDesc("fathom_policy_objects", "How many policies there are, and of what they are made: pods, identities, selectors, classes.", []string{"kind"}, nil),
	}
}

func (m *metrics) count(c diff.Count) {
	m.changes.WithLabelValues("added").Add(float64(c.Added))
	m.changes.WithLabelValues("removed").Add(float64(c.Removed))
}

// labelsAtMost is how many policies have labels of their own in metrics. What others do is that of "others".
const labelsAtMost = 500

// record counts a packet for the policy whose rule decides, or for all that have no rule for it.
func (m *metrics) record(r recorded) {
	deciding := r.policies
	if r.by.Kind != "" {
		deciding = []policy.ID{r.by.ID}
	}
	if len(deciding) == 0 {
		deciding = []policy.ID{{}} // the policies of its pod are not known
	}
	for _, id := range deciding {
		name := strings.TrimPrefix(id.String(), id.Kind+" ")
		if len(m.labelled) >= labelsAtMost && !m.labelled[name] {
			name = "others"
		}
		m.labelled[name] = true
		m.recorded.WithLabelValues(name, r.key.direction.String(), r.key.verdict).Inc()
	}
}

func (m *metrics) describe(c chan<- *prometheus.Desc) {
	m.seconds.Describe(c)
	m.waited.Describe(c)
	m.rechecks.Describe(c)
	m.ended.Describe(c)
	m.changes.Describe(c)
	m.recorded.Describe(c)
	m.lost.Describe(c)
	c <- m.number
	c <- m.flows
	c <- m.leftOut
}

func (m *metrics) collect(c chan<- prometheus.Metric, s policy.Size, fast fastState) {
	m.seconds.Collect(c)
	m.waited.Collect(c)
	m.rechecks.Collect(c)
	m.ended.Collect(c)
	m.changes.Collect(c)
	m.recorded.Collect(c)
	m.lost.Collect(c)
	for kind, n := range map[string]int{"policy": s.Policies, "pod": s.Pods, "identity": s.Identities, "selector": s.Selectors, "class": s.Classes} {
		c <- prometheus.MustNewConstMetric(m.number, prometheus.GaugeValue, float64(n), kind)
	}
	if fast.path != nil {
		c <- prometheus.MustNewConstMetric(m.flows, prometheus.GaugeValue, float64(fast.flows))
		c <- prometheus.MustNewConstMetric(m.leftOut, prometheus.GaugeValue, float64(fast.path.LeftOut()))
	}
}
