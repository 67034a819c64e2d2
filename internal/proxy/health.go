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
	ports map[uint16]*healthPort
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

// set makes it answer these. A port that another program has is tried again at each call.
func (h *health) set(checks []service.HealthCheck, log *slog.Logger) {
	h.updated.Store(time.Now().UnixNano())
	h.answerForNode()
	for port, p := range h.ports {
		if !slices.ContainsFunc(checks, func(c service.HealthCheck) bool { return c.Port == port }) {
			_ = p.server.Close()
			delete(h.ports, port)
		}
	}
	for _, c := range checks {
		p, found := h.ports[c.Port]
		if !found {
			listener, err := net.Listen("tcp", ":"+strconv.Itoa(int(c.Port)))
			if err != nil {
				log.Warn("a Service's health check port is not answered", "service", c.Service.String(), "port", c.Port, "error", err)
				continue
			}
			p = &healthPort{}
			p.server = &http.Server{Handler: p, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
			go func() { _ = p.server.Serve(listener) }()
			if h.ports == nil {
				h.ports = map[uint16]*healthPort{}
			}
			h.ports[c.Port] = p
		}
		p.check.Store(&c)
	}
}

// answerForNode begins to say that the node carries Services. While kube-proxy is there, it is kube-proxy that says so.
func (h *health) answerForNode() {
	if h.node != nil {
		return
	}
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(nodeHealthPort))
	if err != nil {
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
