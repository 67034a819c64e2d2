package main

import (
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestMain has the tests run in a network namespace of their own, in which this executable is the program, too.
func TestMain(m *testing.M) {
	switch os.Getenv("FATHOM_TEST") {
	case "program":
		main()
		return
	case "namespace":
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			panic(string(out))
		}
		os.Exit(m.Run())
	}
	if os.Getuid() != 0 {
		println("skipped: the tests make a network namespace, which needs root")
		return
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), "FATHOM_TEST=namespace")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if err := cmd.Run(); err != nil {
		os.Exit(1)
	}
}

// startServer is a DNS server of the cluster: TCP alone.
func startServer(t *testing.T, addr string) (asked *atomic.Int64, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	asked = &atomic.Int64{}
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		asked.Add(1)
		q := r.Question[0]
		m := new(dns.Msg).SetReply(r)
		add := func(last byte) {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(10, 0, 0, last)})
		}
		switch q.Name {
		case "many.shop.svc.cluster.local.":
			for i := range 200 {
				add(byte(i))
			}
		case "db.shop.svc.cluster.local.", "www.example.com.":
			add(1)
		default:
			m.Rcode = dns.RcodeNameError
			m.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Name: "cluster.local.", Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: 30}, Ns: "ns.", Mbox: "m.", Minttl: 30}}
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = server.ActivateAndServe() }()
	return asked, func() { _ = server.Shutdown() }
}

// startProgram starts fathom-dns, and ends it with the test.
func startProgram(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("search kube-system.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", append([]string{"-resolv-conf", resolv, "-corefile="}, args...)...)
	cmd.Env = append(os.Environ(), "FATHOM_TEST=program")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
	})
	return cmd
}

func ask(network, name string, kind, class uint16) (*dns.Msg, error) {
	m := new(dns.Msg).SetQuestion(name, kind)
	m.Question[0].Qclass = class
	client := dns.Client{Net: network, Timeout: 2 * time.Second}
	answer, _, err := client.Exchange(m, "169.254.20.10:53")
	return answer, err
}

func mustAsk(t *testing.T, network, name string) *dns.Msg {
	t.Helper()
	m, err := ask(network, name, dns.TypeA, dns.ClassINET)
	if err != nil {
		t.Fatalf("%s over %s: %v", name, network, err)
	}
	return m
}

func TestProgram(t *testing.T) {
	asked, stop := startServer(t, "127.0.0.2:53")
	startProgram(t, "-upstream", "127.0.0.2:53")
	if _, err := ask("udp", "db.shop.svc.cluster.local.", dns.TypeA, dns.ClassINET); err == nil {
		t.Fatal("it answers before the node has the address")
	}
	giveAddress(t)
	eventually(t, "it answers", answers)
	for range 3 {
		for _, network := range []string{"udp", "tcp"} {
			if m := mustAsk(t, network, "db.shop.svc.cluster.local."); len(m.Answer) != 1 {
				t.Errorf("over %s: %v", network, m)
			}
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("the servers were asked %d times, want once", n)
	}
	// More than a packet of a client without EDNS holds.
	if m := mustAsk(t, "udp", "many.shop.svc.cluster.local."); !m.Truncated {
		t.Errorf("over UDP: %d answers, and none is missing", len(m.Answer))
	}
	if m := mustAsk(t, "tcp", "many.shop.svc.cluster.local."); m.Truncated || len(m.Answer) != 200 {
		t.Errorf("over TCP: truncated %t, %d answers", m.Truncated, len(m.Answer))
	}
	// A search list: three names that do not exist, of which two are answered on the node.
	before := asked.Load()
	for _, domain := range []string{".shop.svc.cluster.local.", ".svc.cluster.local.", ".cluster.local."} {
		if m := mustAsk(t, "udp", "www.example.com"+domain); m.Rcode != dns.RcodeNameError {
			t.Errorf("www.example.com%s: %v", domain, m)
		}
	}
	if m := mustAsk(t, "udp", "www.example.com."); len(m.Answer) != 1 {
		t.Errorf("www.example.com: %v", m)
	}
	if n := asked.Load() - before; n != 4 {
		t.Errorf("the servers were asked %d times, want 4 times", n)
	}
	stop()
	// Longer than answers are kept: while no server can be reached, what was known goes on.
	time.Sleep(clusterNamesKept)
	began := time.Now()
	if m := mustAsk(t, "udp", "db.shop.svc.cluster.local."); len(m.Answer) != 1 {
		t.Errorf("with no server: %v", m)
	}
	if m := mustAsk(t, "udp", "unknown.shop.svc.cluster.local."); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("what is not known, with no server: %v", m)
	}
	t.Logf("both with no server: %v", time.Since(began))
	_, stop = startServer(t, "127.0.0.2:53")
	defer stop()
	for end := time.Now().Add(20 * time.Second); mustAsk(t, "udp", "unknown.shop.svc.cluster.local.").Rcode != dns.RcodeNameError; {
		if time.Now().After(end) {
			t.Fatal("the servers are back, and not asked")
		}
	}
	for url, want := range map[string]string{"http://127.0.0.1:10474/health": "OK", "http://127.0.0.1:10473/metrics": "coredns_nodecache_answers_total"} {
		r, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(r.Body)
		_ = r.Body.Close()
		if !strings.Contains(string(body), want) {
			t.Errorf("%s does not say %s", url, want)
		}
	}
	// A second one listens beside the first, as in an update; the first ends, and nobody notices.
	second := startProgram(t, "-upstream", "127.0.0.2:53")
	if err := second.Process.Signal(syscall.Signal(0)); err != nil {
		t.Error(err)
	}
}

// clusterNamesKept is longer than nodecache keeps names of the cluster.
const clusterNamesKept = 5500 * time.Millisecond

func TestCorefile(t *testing.T) {
	o := options{
		Listen: []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.MustParseAddr("fd66::a")}, Port: 53,
		Upstream: "10.96.7.7:53", Search: []string{"svc.cluster.local", "cluster.local"}, Health: "127.0.0.1:1", Metrics: ":2",
	}
	for _, want := range []string{"bind 169.254.20.10 fd66::a\n", "nodecache 10.96.7.7:53 svc.cluster.local cluster.local\n"} {
		if !strings.Contains(o.corefile(), want) {
			t.Errorf("no %q in\n%s", want, o.corefile())
		}
	}
}

func TestSearchList(t *testing.T) {
	for text, want := range map[string]string{
		"search kube-system.svc.cluster.local svc.cluster.local cluster.local corp.example\nnameserver 10.96.0.10\n": "svc.cluster.local cluster.local corp.example",
		"search kube-system.svc.k8s.example. svc.k8s.example. k8s.example.\n":                                        "svc.k8s.example. k8s.example.",
		"search corp.example\nsearch a.svc.b.c svc.b.c b.c":                                                          "svc.b.c b.c",
		"search corp.example\n":                                                   "", // of the node, not of a pod
		"search one.example two.example three.example":                            "",
		"search kube-system.svc.a.b svc.a.b a.b { import.x \"q #c corp_x.example": "svc.a.b a.b import.x corp_x.example", // no part of a Corefile but names
		"": "",
	} {
		if got := strings.Join(searchList(text), " "); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func TestUpstreamOf(t *testing.T) {
	for host, want := range map[string]string{"10.96.0.7": "10.96.0.7:53", "fd00::7": "[fd00::7]:53"} {
		if got, err := upstreamOf(func(string) string { return host }); err != nil || got != want {
			t.Errorf("%s: got %s, %v", host, got, err)
		}
	}
	if _, err := upstreamOf(func(string) string { return "" }); err == nil || !slices.Contains(strings.Fields(err.Error()), "kube-dns-upstream") {
		t.Errorf("without the Service: %v", err)
	}
}
