package nodecache

import (
	"errors"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/fathom-network/fathom/kit/addons/dns/share"
)

var (
	answersTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "answers_total",
		Help: "Answers by where they came from: cache, upstream, stale (an older one, since no server gave another), none (SERVFAIL).",
	}, []string{"from"})
	lookaheadsTotal = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "lookaheads_total",
		Help: "Questions asked since a search list makes them the next.",
	})
	aside = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "aside",
		Help: "1 while pods ask the cluster's servers themselves, since what those answer depends on who asks.",
	})
	refusedTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "refused_total",
		Help: "What clients did not get since there was too much of it: questions to the servers, requests waiting for them, " +
			"TCP connections; by whether the client had its share of them (client) or all were taken (all).",
	}, []string{"what", "by"})
)

// One series each, looked up once: of a vector that is a lock, and new series and scrapes take it, too.
var (
	fromCache    = answersTotal.WithLabelValues("cache")
	fromUpstream = answersTotal.WithLabelValues("upstream")
	fromStale    = answersTotal.WithLabelValues("stale")
	fromNone     = answersTotal.WithLabelValues("none")

	overQuestions   = newOver("questions")
	overWaiting     = newOver("requests")
	overConnections = newOver("connections")
)

// over counts what was refused of one thing.
type over struct{ client, all prometheus.Counter }

func newOver(what string) over {
	return over{refusedTotal.WithLabelValues(what, "client"), refusedTotal.WithLabelValues(what, "all")}
}

// refused counts it; err is share.ErrClient or share.ErrAll.
func refused(o over, err error) {
	if errors.Is(err, share.ErrClient) {
		o.client.Inc()
	} else {
		o.all.Inc()
	}
}

// RefusedConnection counts a client's connection that was not taken, err being share.ErrClient or share.ErrAll.
func RefusedConnection(err error) { refused(overConnections, err) }

// Aside says whether pods ask the cluster's servers themselves.
func Aside(is bool) {
	if is {
		aside.Set(1)
	} else {
		aside.Set(0)
	}
}

// measure has the cache's own numbers among the metrics, until it is closed. They are read without a lock that answers
// need.
func (c *NodeCache) measure() {
	for name, f := range map[string]struct {
		help string
		get  func() int
	}{
		"questions": {"Questions on their way to the servers.", c.upstream.Flights},
		"requests":  {"Requests that wait for the servers.", c.waiting.Taken},
	} {
		gauge := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: plugin.Namespace, Subsystem: "nodecache", Name: name, Help: f.help,
		}, func() float64 { return float64(f.get()) })
		// In tests there may be several at once; the first one's stays, and nobody looks at the others'.
		if prometheus.Register(gauge) == nil {
			c.gauges = append(c.gauges, gauge)
		}
	}
}
