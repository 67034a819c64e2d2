package testenv

import (
	"crypto/tls"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// FaultProxy stands between clients and an API server, and does to requests what networks, overloaded servers and servers
// that were restored from a backup do.
type FaultProxy struct {
	Kubeconfig string // as the one that the proxy was made of, with the proxy's address

	front    *httptest.Server
	mu       sync.Mutex
	fault    func(*http.Request) Fault
	requests map[string]int
}

// Fault is what becomes of a request. The zero value passes it on.
type Fault struct {
	// Answer, if set, answers in the server's place.
	Answer http.HandlerFunc
	// Wait, if set, is waited for before the request is passed on.
	Wait <-chan struct{}
	// Delay is waited before each piece of the server's answer.
	Delay time.Duration
	// Cut, if positive, ends the connection when that many bytes of the server's answer have been passed on.
	Cut int
}

// Hang does not answer until the client gives up.
var Hang = Fault{Answer: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }}

// Fail answers with a status as an API server says it. 429 and 503 name a time to come back, in seconds, unless it is empty.
func Fail(code int, reason, retryAfter string) Fault {
	return Fault{Answer: func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if retryAfter != "" {
			w.Header().Set("Retry-After", retryAfter)
		}
		w.WriteHeader(code)
		_, _ = w.Write(status(code, reason))
	}}
}

// Expire accepts a watch, and then says in the stream that its resource version is too old, as an API server does whose
// etcd was compacted.
var Expire = Fault{Answer: func(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(w, `{"type": "ERROR", "object": %s}`+"\n", status(http.StatusGone, "Expired"))
}}

func status(code int, reason string) []byte {
	return fmt.Appendf(nil, `{"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "a fault of the test's", "reason": %q, "code": %d}`, reason, code)
}

var serverLine = regexp.MustCompile(`("?server"?: *")(https://[^"]+)"`)

// NewFaultProxy starts a proxy before the API server of a kubeconfig.
func NewFaultProxy(t testing.TB, kubeconfig string) *FaultProxy {
	t.Helper()
	text, err := os.ReadFile(kubeconfig)
	Must(t, err)
	found := serverLine.FindSubmatch(text)
	if found == nil {
		t.Fatalf("%s names no server", kubeconfig)
	}
	target, err := url.Parse(string(found[2]))
	Must(t, err)
	p := &FaultProxy{requests: map[string]int{}}
	pass := &httputil.ReverseProxy{
		Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, // the test's own server
		FlushInterval: -1,
		// The client has gone, or the test ends.
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	p.front = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		verb := r.Method
		if IsWatch(r) {
			verb = "WATCH"
		}
		p.requests[verb+" "+resource(r)]++
		f := Fault{}
		if p.fault != nil {
			f = p.fault(r)
		}
		p.mu.Unlock()
		if f.Answer != nil {
			f.Answer(w, r)
			return
		}
		if f.Wait != nil {
			select {
			case <-f.Wait:
			case <-r.Context().Done():
			}
		}
		pass.ServeHTTP(&spoiled{ResponseWriter: w, fault: f, left: f.Cut}, r)
	}))
	p.front.EnableHTTP2 = true
	p.front.StartTLS()
	t.Cleanup(func() {
		p.front.CloseClientConnections()
		p.front.Close()
	})
	p.Kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	Must(t, os.WriteFile(p.Kubeconfig, serverLine.ReplaceAll(text, []byte("${1}"+p.front.URL+`"`)), 0o600))
	return p
}

// Set has requests from now on go through fault; nil passes them on. Watches that are under way are ended.
func (p *FaultProxy) Set(fault func(*http.Request) Fault) {
	p.mu.Lock()
	p.fault = fault
	p.mu.Unlock()
	p.front.CloseClientConnections()
}

// Requests returns how many there were, by "VERB RESOURCE", a watch's verb being WATCH.
func (p *FaultProxy) Requests() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.requests)
}

// resource is the plural of what a request is for.
func resource(r *http.Request) string {
	words := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	skip := 2 // api/v1
	if words[0] == "apis" {
		skip = 3 // apis/GROUP/VERSION
	}
	words = words[min(skip, len(words)-1):]
	if words[0] == "namespaces" && len(words) > 2 {
		words = words[2:]
	}
	return words[0]
}

// IsWatch says whether a request is one for a watch.
func IsWatch(r *http.Request) bool {
	w := r.URL.Query().Get("watch")
	return w == "1" || w == "true"
}

// spoiled passes an answer on as a fault says.
type spoiled struct {
	http.ResponseWriter
	fault Fault
	left  int
}

// Unwrap is for http.ResponseController.
func (s *spoiled) Unwrap() http.ResponseWriter { return s.ResponseWriter }

func (s *spoiled) Write(b []byte) (int, error) {
	time.Sleep(s.fault.Delay)
	if s.fault.Cut == 0 {
		return s.ResponseWriter.Write(b)
	}
	if len(b) >= s.left {
		_, _ = s.ResponseWriter.Write(b[:s.left])
		_ = http.NewResponseController(s.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	s.left -= len(b)
	return s.ResponseWriter.Write(b)
}
