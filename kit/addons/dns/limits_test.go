package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// giveAddress gives the namespace the cache's address, for as long as the test lasts.
func giveAddress(t *testing.T) {
	t.Helper()
	change := func(how string) {
		if out, err := exec.Command("ip", "addr", how, "169.254.20.10/32", "dev", "lo").CombinedOutput(); err != nil {
			t.Errorf("ip addr %s: %v: %s", how, err, out)
		}
	}
	change("add")
	t.Cleanup(func() { change("del") })
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not so after 30 s: %s", what)
		}
	}
}

// answers says whether the program answers what the agent asks for.
func answers() bool {
	m, err := ask("tcp", "version.bind.", dns.TypeTXT, dns.ClassCHAOS)
	return err == nil && len(m.Answer) == 1
}

// dialFrom makes a TCP connection to the cache from an address of the client's.
func dialFrom(t *testing.T, client string) (net.Conn, error) {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(client)}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp", "169.254.20.10:53")
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

func mustDialFrom(t *testing.T, client string) net.Conn {
	t.Helper()
	c, err := dialFrom(t, client)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ended says whether the other end closes or resets the connection within the time.
func ended(c net.Conn, within time.Duration) bool {
	_ = c.SetReadDeadline(time.Now().Add(within))
	_, err := io.Copy(io.Discard, c)
	return err == nil || !errors.Is(err, os.ErrDeadlineExceeded)
}

// TestConnections has a client open more TCP connections than its share, while another asks.
func TestConnections(t *testing.T) {
	_, stop := startServer(t, "127.0.0.2:53")
	defer stop()
	giveAddress(t)
	startProgram(t, "-upstream", "127.0.0.2:53")
	eventually(t, "it answers", answers)
	const share = maxConns / 2
	for range share {
		mustDialFrom(t, "127.0.0.5")
	}
	for range 50 {
		// It may be reset before the client has noticed that it is there.
		c, err := dialFrom(t, "127.0.0.5")
		if err != nil && !errors.Is(err, syscall.ECONNRESET) || err == nil && !ended(c, 2*time.Second) {
			t.Fatalf("one more than its share is open: %v", err)
		}
	}
	other := &dns.Conn{Conn: mustDialFrom(t, "127.0.0.6")}
	if err := other.WriteMsg(new(dns.Msg).SetQuestion("db.shop.svc.cluster.local.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	if m, err := other.ReadMsg(); err != nil || len(m.Answer) != 1 {
		t.Errorf("another client: %v, %v", m, err)
	}
	r, err := http.Get("http://127.0.0.1:10473/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	page, _ := io.ReadAll(r.Body)
	if want := `coredns_nodecache_refused_total{by="client",what="connections"} 50`; !strings.Contains(string(page), want) {
		t.Errorf("the metrics do not say %s", want)
	}
}

// TestSlowReader has a client ask without end, and read nothing.
func TestSlowReader(t *testing.T) {
	_, stop := startServer(t, "127.0.0.2:53")
	defer stop()
	giveAddress(t)
	startProgram(t, "-upstream", "127.0.0.2:53")
	eventually(t, "it answers", answers)
	raw := mustDialFrom(t, "127.0.0.5")
	_ = raw.(*net.TCPConn).SetReadBuffer(4096)
	c := &dns.Conn{Conn: raw}
	q := new(dns.Msg).SetQuestion("many.shop.svc.cluster.local.", dns.TypeA)
	eventually(t, "the connection is ended", func() bool {
		_ = c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			if err := c.WriteMsg(q); err != nil {
				return !errors.Is(err, os.ErrDeadlineExceeded)
			}
		}
	})
}

// TestHTTP has clients that hold requests, of which one has its share.
func TestHTTP(t *testing.T) {
	hold := make(chan struct{})
	var held sync.WaitGroup
	server := newHTTPServer("/metrics", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		held.Done()
		<-hold
	}))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	get := func(from string) (int, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: d.DialContext}}
		r, err := client.Get("http://" + l.Addr().String() + "/metrics")
		if err != nil {
			return 0, err
		}
		return r.StatusCode, r.Body.Close()
	}
	var wg sync.WaitGroup
	held.Add(maxHTTPRequests / 2)
	for range maxHTTPRequests / 2 {
		wg.Go(func() { _, _ = get("127.0.0.5") })
	}
	held.Wait()
	if code, err := get("127.0.0.5"); code != http.StatusServiceUnavailable {
		t.Errorf("beyond its share a client gets %d, %v", code, err)
	}
	held.Add(1)
	wg.Go(func() {
		if code, err := get("127.0.0.6"); code != http.StatusOK {
			t.Errorf("another client gets %d, %v", code, err)
		}
	})
	held.Wait()
	close(hold)
	wg.Wait()
	if server.ReadHeaderTimeout == 0 || server.ReadTimeout == 0 || server.WriteTimeout == 0 || server.IdleTimeout == 0 || server.MaxHeaderBytes == 0 {
		t.Errorf("something has no bound: %+v", server)
	}
}

// TestAnotherUser has an ordinary user's program take over from root's, with which it cannot share a port.
func TestAnotherUser(t *testing.T) {
	_, stop := startServer(t, "127.0.0.2:53")
	defer stop()
	giveAddress(t)
	first := startProgram(t, "-upstream", "127.0.0.2:53")
	eventually(t, "the first answers", answers)

	const user, netBindService = 65532, 10
	resolv, err := os.CreateTemp("", "resolv.conf-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(resolv.Name())
	if err := errors.Join(resolv.Chmod(0o644), resolv.Close()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	second := exec.CommandContext(ctx, "/proc/self/exe", "-upstream", "127.0.0.2:53", "-corefile=", "-resolv-conf", resolv.Name())
	second.Env = append(os.Environ(), "FATHOM_TEST=program")
	// As in its pod: no user but this, and no capability but this one.
	second.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: user, Gid: user}, AmbientCaps: []uintptr{netBindService}}
	said, err := second.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = second.Wait() }()
	buffer := make([]byte, 1024)
	n, err := said.Read(buffer)
	if got := string(buffer[:n]); err != nil || !strings.Contains(got, "waiting for the process of another user") {
		t.Fatalf("it says %q, %v", got, err)
	}
	go func() { _, _ = io.Copy(os.Stderr, said) }()
	if !answers() {
		t.Error("the first answers no more")
	}
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second answers", answers)
	if m := mustAsk(t, "udp", "db.shop.svc.cluster.local."); len(m.Answer) != 1 {
		t.Errorf("over UDP: %v", m)
	}
}
