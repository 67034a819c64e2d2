package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/vip"
	"github.com/fathom-network/fathom/internal/serve"
)

// monitor serves the controller's probes and metrics; docs/load-balancer.md lists them.
type monitor struct {
	registry  *prometheus.Registry
	leading   prometheus.Gauge
	passes    *prometheus.CounterVec
	addresses *prometheus.GaugeVec
	assigned  *prometheus.GaugeVec
	valid     *prometheus.GaugeVec
	services  prometheus.Gauge
	pending   *prometheus.GaugeVec
	patience  time.Duration

	mu      sync.Mutex
	leads   bool
	turned  time.Time // the end of the loop's last iteration
	problem string    // why it does not assign addresses; empty if it does, or if another controller leads
}

func newMonitor(resync time.Duration) *monitor {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	m := &monitor{
		registry: prometheus.NewRegistry(), patience: resync + stuck,
		leading:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_controller_leading", Help: "Whether this controller leads: only the leader assigns addresses and has metrics of pools and Services."}),
		passes:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_controller_passes_total", Help: "Passes over all Services and pools, by result."}, []string{"result"}),
		addresses: gauge("fathom_addresspool_addresses", "Addresses that an AddressPool has.", "pool", "family"),
		assigned:  gauge("fathom_addresspool_assigned", "Addresses of an AddressPool that Services have.", "pool", "family"),
		valid:     gauge("fathom_addresspool_valid", "Whether an AddressPool is valid and assigns addresses.", "pool"),
		services:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_loadbalancer_services", Help: "Services that have all addresses that they should have."}),
		pending:   gauge("fathom_loadbalancer_services_pending", "Services that wait for an address, by the reason that their event names.", "reason"),
	}
	for _, result := range []string{"success", "error"} {
		m.passes.WithLabelValues(result)
	}
	m.registry.MustRegister(m.leading, m.passes, m.addresses, m.assigned, m.valid, m.services, m.pending,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// stuck is how much later than due an iteration of the loop may end before the process is restarted. A slow API server does
// not delay it, since the loop does not wait for answers.
const stuck = time.Minute

// lead records whether this controller leads.
func (m *monitor) lead(leads bool) {
	m.mu.Lock()
	m.leads, m.turned, m.problem = leads, time.Now(), ""
	if leads {
		m.problem = "the API server has not listed everything yet"
	}
	m.mu.Unlock()
	m.leading.Set(0)
	if leads {
		m.leading.Set(1)
	}
}

// passed records the result of a pass. Before the watches are synced, a pass does nothing.
func (m *monitor) passed(synced bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.turned = time.Now()
	switch {
	case err != nil:
		m.problem = err.Error()
		m.passes.WithLabelValues("error").Inc()
	case synced:
		m.problem = ""
		m.passes.WithLabelValues("success").Inc()
	}
}

// see records what Services have, and each pool's status.
func (m *monitor) see(assignments []vip.Assignment, pools map[string]v1alpha1.AddressPoolStatus) {
	m.pending.Reset()
	for _, reason := range []string{vip.NoPool, vip.PoolExhausted, vip.InvalidRequest, vip.AddressInUse} {
		m.pending.WithLabelValues(reason)
	}
	whole := 0
	for _, a := range assignments {
		if a.Reason == "" {
			whole++
			continue
		}
		m.pending.WithLabelValues(a.Reason).Inc()
	}
	m.services.Set(float64(whole))
	m.addresses.Reset()
	m.assigned.Reset()
	m.valid.Reset()
	for name, s := range pools {
		for family, usage := range map[string]*v1alpha1.AddressPoolUsage{"IPv4": s.IPv4, "IPv6": s.IPv6} {
			if usage != nil {
				m.addresses.WithLabelValues(name, family).Set(float64(usage.Addresses))
				m.assigned.WithLabelValues(name, family).Set(float64(usage.Assigned))
			}
		}
		valid := 0.0
		for _, c := range s.Conditions {
			if c.Type == v1alpha1.PoolValid && c.Status == "True" {
				valid = 1
			}
		}
		m.valid.WithLabelValues(name).Set(valid)
	}
}

// alive returns an error if the process should be restarted.
func (m *monitor) alive() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if late := time.Since(m.turned); m.leads && late > m.patience {
		return fmt.Errorf("the loop is stuck since %v", late.Round(time.Second))
	}
	return nil
}

// ready returns an error if the controller does not do its work. One that waits to lead is ready.
func (m *monitor) ready() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.problem != "" {
		return errors.New(m.problem)
	}
	return nil
}

// serve serves probes at one address and metrics at another; it does not listen on an empty one.
func (m *monitor) serve(ctx context.Context, o Options) (stop func(), err error) {
	probe := func(check func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if err := check(); err != nil {
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	health := http.NewServeMux()
	health.HandleFunc("GET /healthz", probe(m.alive))
	health.HandleFunc("GET /readyz", probe(m.ready))
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	if o.Health != "" {
		s, err := serve.Listen(ctx, serve.Options{Network: "tcp", Address: o.Health, Handler: health, Log: o.Log})
		if err != nil {
			return nil, err
		}
		stops = append(stops, s)
	}
	if o.Metrics != "" {
		s, err := serve.ListenMetrics(ctx, serve.Options{Network: "tcp", Address: o.Metrics, Handler: serve.Metrics(m.registry), Log: o.Log}, o.MetricsAccess, o.Client)
		if err != nil {
			stop()
			return nil, err
		}
		stops = append(stops, s)
	}
	return stop, nil
}
