package proxy

import (
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// health answers the health checks of load balancers outside the cluster, which ask whether to send a Service's traffic to
// this node: at the Service's healthCheckNodePort, and at the node's own port. The answers are kube-proxy's, since cloud
// load balancers are made for those.
type health struct {
	checks []service.HealthCheck
	ports  map[uint16]*healthPort
	// taken holds the ports that another program had at the last attempt to listen.
	taken map[uint16]bool
	// node serves the node's health check, for Services without a port of their own (externalTrafficPolicy: Cluster).
	node *http.Server
	// updated is when the kernel was last known to hold all Services.
	updated atomic.Pointer[time.Time]
	// leaves is true if the node will soon be gone and should get no new connections.
	leaves atomic.Bool
	now    func() time.Time
}

// nodeHealthPort is kube-proxy's port, KEP-3836.
const nodeHealthPort = 10256

// healthPatience is how long the kernel may hold outdated Services before load balancers are told. It is kube-proxy's
// value, which is twice the interval of its syncs; this proxy syncs every second.
const healthPatience = time.Minute

type healthPort struct {
	server  *http.Server
	check   atomic.Pointer[service.HealthCheck]
	healthy func() bool
}

// healthy reports whether the kernel held all Services within healthPatience.
func (h *health) healthy() bool {
	updated := h.updated.Load()
	return updated != nil && h.now().Sub(*updated) < healthPatience
}

// set makes it answer exactly these checks, and notes that the kernel holds all Services now. Only retry tries ports again
// that another program had, since set may be called often.
func (h *health) set(checks []service.HealthCheck, log *slog.Logger) {
	now := h.now()
	h.updated.Store(&now)
	if h.ports != nil && slices.Equal(checks, h.checks) {
		return
	}
	if h.ports == nil {
		h.ports, h.taken = map[uint16]*healthPort{}, map[uint16]bool{}
		h.answerForNode()
	}
	h.checks = checks
	has := func(port uint16) bool {
		return slices.ContainsFunc(checks, func(c service.HealthCheck) bool { return c.Port == port })
	}
	for port, p := range h.ports {
		if !has(port) {
			_ = p.server.Close()
			delete(h.ports, port)
		}
	}
	for port := range h.taken {
		if !has(port) && port != nodeHealthPort {
			delete(h.taken, port)
		}
	}
	for _, c := range checks {
		if h.ports[c.Port] == nil && !h.taken[c.Port] {
			h.answer(c, log)
		}
		if p := h.ports[c.Port]; p != nil {
			p.check.Store(&c)
		}
	}
}

// retry tries to listen again on the ports that another program had.
func (h *health) retry(log *slog.Logger) {
	if h.taken[nodeHealthPort] {
		h.answerForNode()
	}
	for _, c := range h.checks {
		if h.taken[c.Port] && h.ports[c.Port] == nil {
			h.answer(c, log)
		}
	}
}

// answer starts to listen on a Service's port.
func (h *health) answer(c service.HealthCheck, log *slog.Logger) {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(int(c.Port)))
	if err != nil {
		if !h.taken[c.Port] { // logged once
			log.Warn("cannot answer at a Service's health check port", "service", c.Service.String(), "port", c.Port, "error", err)
		}
		h.taken[c.Port] = true
		return
	}
	delete(h.taken, c.Port)
	p := &healthPort{healthy: h.healthy}
	p.check.Store(&c)
	p.server = &http.Server{Handler: p, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	go func() { _ = p.server.Serve(listener) }()
	h.ports[c.Port] = p
}

// answerForNode starts the node's health check (KEP-3836): /livez says whether the node carries Services, /healthz whether
// it will continue to. While kube-proxy runs, kube-proxy has this port and answers.
func (h *health) answerForNode() {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(nodeHealthPort))
	if h.taken[nodeHealthPort] = err != nil; err != nil {
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		eligible := !h.leaves.Load()
		h.sayUpdated(w, h.healthy() && eligible, map[string]any{"nodeEligible": eligible})
	})
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		h.sayUpdated(w, h.healthy(), map[string]any{})
	})
	h.node = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	go func(s *http.Server) { _ = s.Serve(listener) }(h.node)
}

// sayUpdated answers with the given fields and the time at which the kernel last held all Services. As in kube-proxy, the
// time is now unless something is wrong.
func (h *health) sayUpdated(w http.ResponseWriter, ok bool, answer map[string]any) {
	answer["currentTime"] = h.now().UTC()
	if updated := h.updated.Load(); updated != nil {
		answer["lastUpdated"] = updated.UTC()
	}
	say(w, ok, answer)
}

// say writes an answer in kube-proxy's form.
func say(w http.ResponseWriter, ok bool, answer map[string]any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if !ok {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (h *health) close() {
	if h.node != nil {
		_ = h.node.Close()
		h.node = nil
	}
	for port, p := range h.ports {
		_ = p.server.Close()
		delete(h.ports, port)
	}
	h.ports, h.checks, h.taken = nil, nil, nil
}

// ServeHTTP implements http.Handler.
func (p *healthPort) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	c := p.check.Load()
	if c == nil {
		http.Error(w, "not known yet", http.StatusServiceUnavailable)
		return
	}
	healthy := p.healthy()
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(c.LocalEndpoints))
	say(w, healthy && c.LocalEndpoints > 0, map[string]any{
		"service":             map[string]string{"namespace": c.Service.Namespace, "name": c.Service.Name},
		"localEndpoints":      c.LocalEndpoints,
		"serviceProxyHealthy": healthy,
	})
}
