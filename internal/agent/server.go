package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/serve"
)

// serve answers the plugin on a socket, the kubelet's probes and Prometheus.
func (a *Agent) serve(ctx context.Context) (stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, s := range stops {
			s()
		}
	}
	listening := func(s func(), err error) error {
		if err != nil {
			stop()
			return err
		}
		stops = append(stops, s)
		return nil
	}
	if err := listening(a.listenSocket(ctx)); err != nil {
		return nil, err
	}
	health := http.NewServeMux()
	health.Handle("GET /healthz", &a.turned)
	health.Handle("GET /livez", &a.turned)
	health.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if s := a.state.get(); !s.Ready {
			http.Error(w, s.Reason, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	if a.Health != "" {
		if err := listening(serve.Listen(ctx, serve.Options{Network: "tcp", Address: a.Health, Handler: health, Log: a.Log})); err != nil {
			return nil, err
		}
	}
	if a.Metrics != "" {
		o := serve.Options{Network: "tcp", Address: a.Metrics, Handler: serve.Metrics(a.metrics.registry), Log: a.Log}
		if err := listening(serve.ListenMetrics(ctx, o, a.MetricsAccess, a.Client)); err != nil {
			return nil, err
		}
	}
	return stop, nil
}

// socketWrite is what an answer on the socket may take: of 10,000 Services, read back from the kernel, it takes seconds.
const socketWrite = 2 * time.Minute

// listenSocket answers on the socket that the plugin asks. What an agent that was killed has left is replaced.
func (a *Agent) listenSocket(ctx context.Context) (stop func(), err error) {
	path := a.Paths.Socket
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
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
		s, err := a.servicesState(r.Context())
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/balancers", func(w http.ResponseWriter, _ *http.Request) {
		account := a.lb.Account()
		account.Routers = a.bgp.Routers()
		reply(w, account, nil)
	})
	mux.HandleFunc("GET /v1/policies", func(w http.ResponseWriter, _ *http.Request) {
		s, err := a.policies.State()
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/drops", func(w http.ResponseWriter, r *http.Request) {
		after, err := strconv.ParseUint(cmp.Or(r.URL.Query().Get("after"), "0"), 10, 64)
		if err != nil {
			http.Error(w, answer.OneLine(err), http.StatusBadRequest)
			return
		}
		reply(w, a.policies.Records(after), nil)
	})
	mux.HandleFunc("GET /v1/flows", func(w http.ResponseWriter, r *http.Request) {
		s, err := a.policies.Seen(r.Context())
		reply(w, s, err)
	})
	mux.HandleFunc("GET /v1/bgp", func(w http.ResponseWriter, _ *http.Request) {
		account, err := a.bgp.Account()
		reply(w, account, err)
	})
	mux.HandleFunc("GET /v1/pods/{namespace}/{name}", a.answerPod)
	mux.HandleFunc("GET /v1/pods/{namespace}/{name}/policies", a.answerPolicies)
	if stop, err = serve.Listen(ctx, serve.Options{Network: "unix", Address: path, Handler: mux, Log: a.Log, Write: socketWrite}); err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil { // the plugin is root's
		stop()
		return nil, err
	}
	return stop, nil
}

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
