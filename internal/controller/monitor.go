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

// monitor is what a controller says of itself to the kubelet's probes and to Prometheus; docs/load-balancer.md lists it.
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
	turned  time.Time // when the loop last came round
	problem string    // why it does not give out addresses; empty if it does, or another one does
}

func newMonitor(resync time.Duration) *monitor {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	}
	m := &monitor{
		registry: prometheus.NewRegistry(), patience: resync + stuck,
		leading:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_controller_leading", Help: "Whether this controller is the one that gives out addresses: only that one tells of pools and Services."}),
		passes:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fathom_controller_passes_total", Help: "Passes over all Services and pools, by result."}, []string{"result"}),
		addresses: gauge("fathom_addresspool_addresses", "Addresses that an AddressPool has.", "pool", "family"),
		assigned:  gauge("fathom_addresspool_assigned", "Addresses of an AddressPool that Services have.", "pool", "family"),
		valid:     gauge("fathom_addresspool_valid", "Whether an AddressPool gives out addresses.", "pool"),
		services:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "fathom_loadbalancer_services", Help: "Services that have all addresses that they are to have."}),
		pending:   gauge("fathom_loadbalancer_services_pending", "Services that wait for an address, by the reason that their event names.", "reason"),
	}
	for _, result := range []string{"success", "error"} {
		m.passes.WithLabelValues(result)
	}
	m.registry.MustRegister(m.leading, m.passes, m.addresses, m.assigned, m.valid, m.services, m.pending,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// stuck is how much later than it should the loop may come round before the process is started anew. No API server holds
// it up, since none is waited for.
const stuck = time.Minute

// lead notes that this controller leads now, or no more.
func (m *monitor) lead(leads bool) {
	m.mu.Lock()
	m.leads, m.turned, m.problem = leads, time.Now(), ""
	if leads {
		m.problem = "the API server has not told of everything yet"
	}
	m.mu.Unlock()
	m.leading.Set(0)
	if leads {
		m.leading.Set(1)
	}
}

// passed notes how a pass went. One that had not heard of everything has done nothing.
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

// see notes what Services have, and each pool's status.
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

// alive says why the process should be started anew, if it should.
func (m *monitor) alive() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if late := time.Since(m.turned); m.leads && late > m.patience {
		return fmt.Errorf("nothing was looked at for %v", late.Round(time.Second))
	}
	return nil
}

// ready says why the controller does not do its part. One that waits for its turn does.
func (m *monitor) ready() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.problem != "" {
		return errors.New(m.problem)
	}
	return nil
}

// serve answers probes at one address and Prometheus at another; an empty one is not listened at.
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
