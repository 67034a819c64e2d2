package dataplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// serve answers the plugin on a socket, the kubelet's probes and Prometheus.
func (a *Agent) serve(ctx context.Context) (stop func(), err error) {
	var servers []*http.Server
	stop = func() {
		for _, s := range servers {
			_ = s.Close()
		}
	}
	listen := func(network, address string, h http.Handler) error {
		l, err := new(net.ListenConfig).Listen(ctx, network, address)
		if err != nil {
			return fmt.Errorf("listen on %s: %w", address, err)
		}
		s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
		servers = append(servers, s)
		go func() {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				a.Log.Error("a listener ended", "address", address, "error", err)
			}
		}()
		return nil
	}
	if err := a.listenSocket(listen); err != nil {
		return nil, err
	}
	health := http.NewServeMux()
	health.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	health.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s := a.state.get(); !s.Ready {
			http.Error(w, s.Reason, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	metrics := http.NewServeMux()
	metrics.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	for address, h := range map[string]http.Handler{a.Health: health, a.Metrics: metrics} {
		if address == "" {
			continue
		}
		if err := listen("tcp", address, h); err != nil {
			stop()
			return nil, err
		}
	}
	return stop, nil
}

// listenSocket answers on the socket that the plugin asks. What an agent that was killed has left is replaced.
func (a *Agent) listenSocket(listen func(network, address string, h http.Handler) error) error {
	path := a.Paths.Socket
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		s := a.state.get()
		// An agent that has not seen the API yet has no opinion: what was there before it carries pods, and the
		// node must not become NotReady because the API server is away.
		if !s.Ready && !s.Waiting {
			http.Error(w, s.Reason, http.StatusServiceUnavailable)
			return
		}
		reply(w, s, nil)
	})
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		s, err := a.observe()
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/services", func(w http.ResponseWriter, r *http.Request) {
		s, err := a.proxy.State(r.Context())
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/balancers", func(w http.ResponseWriter, _ *http.Request) {
		account := a.lb.Account()
		account.Routers = a.bgp.Routers()
		reply(w, account, nil)
	})
	mux.HandleFunc("GET /v1/pods/{namespace}/{name}", a.answerPod)
	if err := listen("unix", path, mux); err != nil {
		return err
	}
	return os.Chmod(path, 0o600) // the plugin is root's
}

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
