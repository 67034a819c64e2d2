#!/bin/sh
# CoreDNS's cache refreshes over TCP what was asked for over UDP.
#
# Library:  github.com/coredns/coredns v1.14.2, plugins cache and forward.
# Expected: forward asks its upstream by the protocol that the client used, as what is said of its options force_tcp
#           and prefer_udp implies. So with clients on UDP the upstream hears UDP.
# Instead:  the queries that cache makes by itself (`prefetch`, and `serve_stale` in its default mode) come to forward
#           as those of a TCP client, so that the answer is not truncated to the client's size. They go upstream over TCP.
# Known:    a comment in the plugin's source tells why; the pages of cache and forward do not mention it.
# Means:    behind a firewall or a policy that lets only UDP 53 pass, DNS works and prefetching silently never does; with
#           serve_stale, clients get the expired answer for as long as it may be served. Allow TCP to the upstream, or set
#           prefer_udp.
#
# Needs Go; no root. Waits for a TTL of a second.
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
	"time"

	"github.com/coredns/caddy"
	_ "github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/forward"
	"github.com/miekg/dns"
)

func check(err error) {
	if err != nil {
		fmt.Println("not shown:", err)
		os.Exit(1)
	}
}

// run gives the protocols of the upstream's first query and of the one that refreshes its answer.
func run(option string) (first, refresh string) {
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	_, port, _ := net.SplitHostPort(free.LocalAddr().String())
	check(free.Close())
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	check(err)
	stream, err := net.Listen("tcp", packets.LocalAddr().String())
	check(err)
	asked := make(chan string, 100)
	serve := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked <- w.RemoteAddr().Network()
		m := new(dns.Msg)
		m.SetReply(q)
		a, _ := dns.NewRR(q.Question[0].Name + " 1 IN A 192.0.2.10")
		m.Answer = append(m.Answer, a)
		w.WriteMsg(m)
	})
	go dns.ActivateAndServe(nil, packets, serve)
	go dns.ActivateAndServe(stream, nil, serve)
	caddy.Quiet = true
	instance, err := caddy.Start(caddy.CaddyfileInput{ServerTypeName: "dns", Contents: []byte(fmt.Sprintf(`.:%s {
		bind 127.0.0.1
		cache {
			success 100 60 1
			serve_stale
		}
		forward . %s {
			%s
		}
	}`, port, packets.LocalAddr(), option))})
	check(err)
	defer func() {
		instance.Stop()
		packets.Close()
		stream.Close()
	}()

	query := func() string {
		q := new(dns.Msg)
		q.SetQuestion("web.example.", dns.TypeA)
		r, err := dns.Exchange(q, "127.0.0.1:"+port) // over UDP
		check(err)
		if r.Rcode != dns.RcodeSuccess {
			check(fmt.Errorf("answered %s", dns.RcodeToString[r.Rcode]))
		}
		select {
		case protocol := <-asked:
			return protocol
		case <-time.After(20 * time.Second):
			check(fmt.Errorf("the upstream was not asked"))
		}
		return ""
	}
	first = query()
	time.Sleep(2 * time.Second) // the answer expires
	return first, query()
}

func main() {
	first, refresh := run("")
	fmt.Printf("forward:              client over udp, upstream asked over %s, to refresh over %s\n", first, refresh)
	first2, refresh2 := run("prefer_udp")
	fmt.Printf("forward, prefer_udp:  client over udp, upstream asked over %s, to refresh over %s\n", first2, refresh2)
	if first != "udp" || refresh != "tcp" || first2 != "udp" || refresh2 != "udp" {
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
