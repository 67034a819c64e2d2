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

	"github.com/fathom-network/fathom/internal/service"
)

// health answers load balancers outside the cluster that ask whether to send a Service's traffic to this node: at the
// Service's healthCheckNodePort. The answer is that of kube-proxy, which cloud load balancers are made for.
type health struct {
	checks []service.HealthCheck
	ports  map[uint16]*healthPort
	// taken are the ports that another program had when they were tried last.
	taken map[uint16]bool
	// node is where load balancers ask about Services without a port of their own (externalTrafficPolicy: Cluster).
	node *http.Server
	// updated is when the kernel was last known to hold all Services, in nanoseconds since 1970.
	updated atomic.Int64
}

// nodeHealthPort is kube-proxy's, KEP-3836.
const nodeHealthPort = 10256

type healthPort struct {
	server *http.Server
	check  atomic.Pointer[service.HealthCheck]
}

// set makes it answer these, for the kernel holds all Services now. A port that another program has is tried again by
// retry alone: changes may be many.
func (h *health) set(checks []service.HealthCheck, log *slog.Logger) {
	h.updated.Store(time.Now().UnixNano())
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

// retry tries the ports again that another program had.
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

// answer begins to answer at a Service's port.
func (h *health) answer(c service.HealthCheck, log *slog.Logger) {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(int(c.Port)))
	if err != nil {
		if !h.taken[c.Port] { // said once
			log.Warn("a Service's health check port is not answered", "service", c.Service.String(), "port", c.Port, "error", err)
		}
		h.taken[c.Port] = true
		return
	}
	delete(h.taken, c.Port)
	p := &healthPort{}
	p.check.Store(&c)
	p.server = &http.Server{Handler: p, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	go func() { _ = p.server.Serve(listener) }()
	h.ports[c.Port] = p
}

// answerForNode begins to say that the node carries Services. While kube-proxy is there, it is kube-proxy that says so.
func (h *health) answerForNode() {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(nodeHealthPort))
	if h.taken[nodeHealthPort] = err != nil; err != nil {
		return
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		_ = json.NewEncoder(w).Encode(map[string]any{
			"lastUpdated": time.Unix(0, h.updated.Load()).UTC(), "currentTime": time.Now().UTC(), "nodeEligible": true})
	})
	h.node = &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
	go func(s *http.Server) { _ = s.Serve(listener) }(h.node)
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
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Load-Balancing-Endpoint-Weight", strconv.Itoa(c.LocalEndpoints))
	if c.LocalEndpoints == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(map[string]any{
		"service":             map[string]string{"namespace": c.Service.Namespace, "name": c.Service.Name},
		"localEndpoints":      c.LocalEndpoints,
		"serviceProxyHealthy": true,
	})
}
