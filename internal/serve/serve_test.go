package serve

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// free returns an address that nobody listens at.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func listen(t *testing.T, h http.Handler, access Access, r Reviewer) string {
	t.Helper()
	at := free(t)
	stop, err := ListenMetrics(t.Context(), Options{Network: "tcp", Address: at, Handler: h, Log: slog.New(slog.DiscardHandler)}, access, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return at
}

// TestConnectionsHaveABound has one client open as many connections as it can, and another one still be answered.
func TestConnectionsHaveABound(t *testing.T) {
	at := listen(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }), Open, nil)
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	for range 4 * connections {
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	// Those that were too many are closed by the server.
	closed := 0
	for _, c := range open {
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			var n net.Error
			if !errors.As(err, &n) || !n.Timeout() {
				closed++
			}
		}
	}
	if kept := len(open) - closed; kept != connectionsOfEach {
		t.Errorf("one client has %d connections, want %d", kept, connectionsOfEach)
	}
	other := http.Client{Transport: &http.Transport{DialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext}}
	defer other.CloseIdleConnections()
	r, err := other.Get("http://" + at + "/metrics")
	if err != nil {
		t.Fatalf("another client: %v", err)
	}
	r.Body.Close()
	// What is closed makes room again.
	for _, c := range open {
		c.Close()
	}
	open = nil
	for deadline := time.Now().Add(time.Minute); ; {
		if r, err := http.Get("http://" + at + "/metrics"); err == nil {
			r.Body.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("there is no room after all has closed")
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestTimeouts has every server bound what a client can hold up.
func TestTimeouts(t *testing.T) {
	at := listen(t, http.NotFoundHandler(), Open, nil)
	c, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX: "); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(6 * HeaderTimeout))
	if _, err := bufio.NewReader(c).ReadString(0); !errors.Is(err, io.EOF) {
		t.Errorf("a header that never ends: %v, want that the server closes", err)
	}
}

type gatherer struct {
	calls atomic.Int32
	hang  chan struct{}
}

func (g *gatherer) Gather() ([]*dto.MetricFamily, error) {
	g.calls.Add(1)
	if g.hang != nil {
		<-g.hang
	}
	return nil, nil
}

// TestScrapesAreFew has 64 scrape at once while gathering hangs: a few wait, all others are told to come later.
func TestScrapesAreFew(t *testing.T) {
	g := &gatherer{hang: make(chan struct{})}
	h := Metrics(g)
	var ok, busy atomic.Int32
	var asking sync.WaitGroup
	for range 64 {
		asking.Go(func() {
			w := &recorder{header: http.Header{}}
			r, _ := http.NewRequest(http.MethodGet, "/metrics", nil)
			h.ServeHTTP(w, r)
			switch w.code {
			case http.StatusServiceUnavailable:
				busy.Add(1)
			default:
				ok.Add(1)
			}
		})
	}
	for deadline := time.Now().Add(time.Minute); busy.Load() != 64-scrapes; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d were told to come later, want %d", busy.Load(), 64-scrapes)
		}
	}
	close(g.hang)
	asking.Wait()
	if ok.Load() != scrapes || g.calls.Load() != 1 {
		t.Errorf("%d were answered by gathering %d times, want %d by gathering once", ok.Load(), g.calls.Load(), scrapes)
	}
}

type recorder struct {
	header http.Header
	code   int
}

func (r *recorder) Header() http.Header { return r.header }
func (r *recorder) WriteHeader(c int)   { r.code = c }
func (r *recorder) Write(b []byte) (int, error) {
	if r.code == 0 {
		r.code = http.StatusOK
	}
	return len(b), nil
}

// TestGatheredOnceAMoment has many scrapes after another cost one, until what they get is old.
func TestGatheredOnceAMoment(t *testing.T) {
	g := &gatherer{}
	now := time.Unix(1000, 0)
	s := &shared{from: g, now: func() time.Time { return now }}
	for i := range 5 {
		for range 10 {
			if _, err := s.Gather(); err != nil {
				t.Fatal(err)
			}
		}
		if got := g.calls.Load(); got != int32(i+1) {
			t.Fatalf("gathered %d times in %d moments", got, i+1)
		}
		now = now.Add(freshness)
	}
}

type reviewer struct {
	mu    sync.Mutex
	asked int
	err   error
}

func (r *reviewer) ReviewToken(_ context.Context, token, path string) (known, allowed bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asked++
	return token == "good" || token == "weak", token == "good" && path == "/metrics", r.err
}

// TestGuard asks by TLS with tokens of all kinds.
func TestGuard(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "secret", Help: "x"}))
	r := &reviewer{}
	at := listen(t, Metrics(registry), Authenticated, r)
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	for _, tc := range []struct {
		token string
		code  int
	}{{"", 401}, {"bad", 401}, {"weak", 403}, {"good", 200}, {"good", 200}, {"bad", 401}} {
		req, _ := http.NewRequest(http.MethodGet, "https://"+at+"/metrics", nil)
		if tc.token != "" {
			req.Header.Set("Authorization", "Bearer "+tc.token)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != tc.code {
			t.Errorf("token %q: %s, want %d", tc.token, resp.Status, tc.code)
		}
		if tc.code != 200 && len(body) > 200 {
			t.Errorf("token %q is told %q", tc.token, body)
		}
	}
	if r.asked != 3 {
		t.Errorf("asked %d times about 3 tokens", r.asked)
	}
	if resp, err := http.Get("http://" + at + "/metrics"); err == nil {
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			t.Error("answers without TLS")
		}
	}
}

// TestGuardForgets has strangers' tokens neither grow what is kept, nor push out the good one, nor cost the API server more
// than its share.
func TestGuardForgets(t *testing.T) {
	r := &reviewer{}
	g := Guard(http.NotFoundHandler(), r).(*guard)
	now := time.Unix(1000, 0)
	g.now = func() time.Time { return now }
	if v, err := g.review(t.Context(), "good", "/metrics"); err != nil || !v.allowed {
		t.Fatal(v, err)
	}
	busy := 0
	for i := range 200 {
		if _, err := g.review(t.Context(), fmt.Sprint("bad", i), "/metrics"); errors.Is(err, errBusy) {
			busy++
		}
	}
	if busy < 150 || r.asked > 50 {
		t.Errorf("of 200 strange tokens %d were asked about, and %d told to wait", r.asked-1, busy)
	}
	g.limit.SetLimit(1e9)
	g.limit.SetBurst(1e6)
	for i := range 10 * verdicts {
		if _, err := g.review(t.Context(), fmt.Sprint("worse", i), "/metrics"); err != nil {
			t.Fatal(err)
		}
	}
	asked := r.asked
	if v, err := g.review(t.Context(), "good", "/metrics"); err != nil || !v.allowed || r.asked != asked {
		t.Errorf("the good token was forgotten: %+v, %v", v, err)
	}
	if len(g.known) > verdicts {
		t.Errorf("%d tokens are remembered, want at most %d", len(g.known), verdicts)
	}
	now = now.Add(verdictHolds)
	if _, err := g.review(t.Context(), "good", "/metrics"); err != nil || r.asked != asked+1 {
		t.Errorf("after its time it was not asked about again: %v", err)
	}
	// An API server that does not answer lets nobody in.
	r.err = errors.New("no API server")
	if v, err := g.review(t.Context(), "new", "/metrics"); err == nil || v.allowed {
		t.Errorf("without an API server: %+v, %v", v, err)
	}
}
