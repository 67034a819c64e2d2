#!/bin/sh
# CoreDNS's `serve_stale ... verify` serves an old NXDOMAIN of a name that it has since seen exist.
#
# Library:  github.com/coredns/coredns v1.14.2, plugin cache.
# Expected: when the upstream is away, serve_stale answers with the newest answer that it had.
# Instead:  denials and other answers are two caches, and denials are looked at first. In mode `verify`, an expired denial
#           that is refreshed by a positive answer stays beside it, and is found first from then on. The positive answer
#           is cached and never used, so that each query goes upstream, whatever its TTL; and when the upstream is away,
#           NXDOMAIN is served for as long as serve_stale allows (an hour by default).
#           In mode `immediate`, the default, the refresh removes the denial.
# Known:    for `immediate` it was coredns/coredns#3586, mended in 1.6.9; for cached SERVFAIL #7956, mended by #8003.
#           coredns/coredns#8378 (not in 1.14.2) adds a policy that removes such denials.
# Means:    a Service that was asked for before it existed does not resolve while the cluster's DNS is away, which is
#           what a node cache has serve_stale for. Keep denials short, and use `immediate` where that counts.
#
# Needs Go; no root. Waits for a TTL of a second in each mode.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$work"
export CGO_ENABLED=0 GOWORK=off GOFLAGS=-mod=mod

cat >main.go <<'EOF'
package main

import (
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	_ "github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/forward"
	"github.com/miekg/dns"
)

const name = "web.default.svc.cluster.local."

const (
	denies = iota
	answers
	away // answers SERVFAIL, as a server does whose own upstream is away
)

var (
	upstream atomic.Int32
	asked    atomic.Int32
)

func serve(w dns.ResponseWriter, q *dns.Msg) {
	asked.Add(1)
	m := new(dns.Msg)
	m.SetReply(q)
	switch upstream.Load() {
	case denies:
		m.Rcode = dns.RcodeNameError
		soa, _ := dns.NewRR("cluster.local. 1 IN SOA ns.cluster.local. admin.cluster.local. 1 7200 1800 86400 1")
		m.Ns = append(m.Ns, soa)
	case answers:
		a, _ := dns.NewRR(name + " 60 IN A 192.0.2.10")
		m.Answer = append(m.Answer, a)
	case away:
		m.Rcode = dns.RcodeServerFailure
	}
	w.WriteMsg(m)
}

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(1)
	}
}

// run says whether the name was denied while the upstream was away, and how many of two queries for it within
// the TTL of its answer went upstream.
func run(mode string) (denied bool, upstreamQueries int32) {
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	_, port, _ := net.SplitHostPort(free.LocalAddr().String())
	check(free.Close())
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	stream, err := net.Listen("tcp", server.LocalAddr().String()) // mode immediate refreshes over TCP
	check(err)
	go dns.ActivateAndServe(nil, server, dns.HandlerFunc(serve))
	go dns.ActivateAndServe(stream, nil, dns.HandlerFunc(serve))
	caddy.Quiet = true
	instance, err := caddy.Start(caddy.CaddyfileInput{ServerTypeName: "dns", Contents: []byte(fmt.Sprintf(`.:%s {
		bind 127.0.0.1
		cache {
			success 100 60 1
			denial 100 1 1
			serve_stale 1h %s
		}
		forward . %s
	}`, port, mode, server.LocalAddr()))})
	check(err)
	defer func() {
		instance.Stop()
		server.Close()
		stream.Close()
	}()

	query := func() string {
		q := new(dns.Msg)
		q.SetQuestion(name, dns.TypeA)
		r, err := dns.Exchange(q, "127.0.0.1:"+port)
		check(err)
		return dns.RcodeToString[r.Rcode]
	}
	upstream.Store(denies)
	query()
	time.Sleep(2 * time.Second) // the denial expires
	upstream.Store(answers)
	for end := time.Now().Add(20 * time.Second); query() != "NOERROR"; { // immediate answers once more with the denial
		if time.Now().After(end) {
			check(fmt.Errorf("the answer was not refreshed"))
		}
		time.Sleep(50 * time.Millisecond)
	}
	asked.Store(0)
	query()
	query()
	upstreamQueries = asked.Load()
	upstream.Store(away)
	return query() == "NXDOMAIN", upstreamQueries
}

func main() {
	holds := true
	for _, mode := range []string{"immediate", "verify"} {
		denied, queries := run(mode)
		fmt.Printf("serve_stale 1h %-9s  two queries within the TTL ask upstream: %d  upstream away, NXDOMAIN: %v\n", mode, queries, denied)
		holds = holds && denied == (mode == "verify") && (queries == 2) == (mode == "verify")
	}
	if !holds {
		fmt.Println("CHANGED")
		os.Exit(1)
	}
	fmt.Println("as described")
}
EOF
go mod init finding >/dev/null 2>&1
go get github.com/coredns/coredns@v1.14.2 >log 2>&1 || { cat log; exit 1; }
go build -o finding .
go list -m github.com/coredns/coredns
./finding
