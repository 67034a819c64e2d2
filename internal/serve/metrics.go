package serve

import (
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
)

const (
	// scrapes is how many are answered at once; others get 503, and Prometheus tries again at its next interval.
	scrapes = 4
	// freshness is how old the metrics of a scrape may be: no more of them are gathered than one in that time, however many
	// scrape.
	freshness = time.Second
)

// Metrics answers GET /metrics with what is gathered.
func Metrics(g prometheus.Gatherer) http.Handler {
	mux := http.NewServeMux()
	// Compressing costs more than all else of a scrape, on a processor that pods want.
	mux.Handle("GET /metrics", promhttp.HandlerFor(&shared{from: g, now: time.Now}, promhttp.HandlerOpts{MaxRequestsInFlight: scrapes, DisableCompression: true}))
	return mux
}

// shared is a Gatherer whose results are given to all that ask within a moment. Nobody changes them.
type shared struct {
	from prometheus.Gatherer
	now  func() time.Time

	mu       sync.Mutex // held while it gathers: who comes meanwhile gets the same
	at       time.Time
	families []*dto.MetricFamily
	err      error
}

// Gather implements prometheus.Gatherer.
func (s *shared) Gather() ([]*dto.MetricFamily, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at.IsZero() || s.now().Sub(s.at) >= freshness {
		s.families, s.err = s.from.Gather()
		s.at = s.now()
	}
	return s.families, s.err
}
