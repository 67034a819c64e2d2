package main

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// page returns what is at a URL, or nothing.
func page(url string) string {
	r, err := http.Get(url)
	if err != nil {
		return ""
	}
	defer r.Body.Close()
	body, _ := io.ReadAll(r.Body)
	return string(body)
}

// TestAside has the servers answer by who asks, and then not, and then again: what a cache answers is what its node's
// address is told, so it ends its connections and does not answer, and pods are led to the servers themselves.
func TestAside(t *testing.T) {
	const alike, personal = ".:53 {\n errors\n forward . 192.0.2.53\n}\n", ".:53 {\n acl {\n  block net 10.244.0.0/16\n }\n forward . 192.0.2.53\n}\n"
	path := filepath.Join(t.TempDir(), "Corefile")
	say := func(text string) { // as kubelet does, at once
		if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	const health, metrics = "http://127.0.0.1:10474/health", "http://127.0.0.1:10473/metrics"
	isAside := func() {
		t.Helper()
		eventually(t, "it says why it does not answer", func() bool { return strings.Contains(page(health), "Corefile:2: server .:53 has acl") })
		eventually(t, "it counts so", func() bool { return strings.Contains(page(metrics), "coredns_nodecache_aside 1\n") })
		for _, network := range []string{"tcp", "udp"} {
			eventually(t, "nothing is answered by "+network, func() bool {
				_, err := ask(network, "db.shop.svc.cluster.local.", dns.TypeA, dns.ClassINET)
				return err != nil
			})
		}
	}
	giveAddress(t)
	asked, stop := startServer(t, "127.0.0.2:53")
	defer stop()
	say(personal)
	startProgram(t, "-upstream", "127.0.0.2:53", "-corefile", path)
	isAside()
	if n := asked.Load(); n != 0 {
		t.Errorf("the servers were asked %d times", n)
	}
	for range 2 {
		say(alike)
		eventually(t, "it answers", answers)
		if m := mustAsk(t, "udp", "db.shop.svc.cluster.local."); len(m.Answer) != 1 {
			t.Errorf("what does not depend on who asks: %v", m)
		}
		if text := page(metrics); page(health) != "OK" || !strings.Contains(text, "coredns_nodecache_aside 0\n") || !strings.Contains(text, "coredns_nodecache_questions 0\n") {
			t.Errorf("it answers, and says %q and\n%s", page(health), text)
		}
		agent := mustDialFrom(t, "169.254.20.10")
		say(personal)
		if !ended(agent, 30e9) {
			t.Error("the agent's connection goes on")
		}
		isAside()
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("the servers were asked %d times, want twice: what was known before is not any more", n)
	}
}

// TestNoCorefile has no configuration of the servers to look at, by which nothing is known.
func TestNoCorefile(t *testing.T) {
	giveAddress(t)
	startProgram(t, "-upstream", "127.0.0.2:53", "-corefile", filepath.Join(t.TempDir(), "Corefile"))
	eventually(t, "it says why it does not answer", func() bool { return strings.Contains(page("http://127.0.0.1:10474/health"), "no such file") })
	if answers() {
		t.Error("it answers all the same")
	}
}
