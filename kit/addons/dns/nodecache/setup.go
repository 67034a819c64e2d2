package nodecache

import (
	"net"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

func init() { plugin.Register("nodecache", setup) }

var (
	answersTotal = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "answers_total",
		Help: "Answers by where they came from: cache, upstream, stale (an older one, since no server gave another), none (SERVFAIL).",
	}, []string{"from"})
	lookaheadsTotal = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace, Subsystem: "nodecache", Name: "lookaheads_total",
		Help: "Questions asked since a search list makes them the next.",
	})
)

// setup reads `nodecache HOST:PORT [SEARCH-DOMAIN...]`.
func setup(c *caddy.Controller) error {
	c.Next()
	args := c.RemainingArgs()
	if len(args) == 0 {
		return plugin.Error("nodecache", c.ArgErr())
	}
	if _, _, err := net.SplitHostPort(args[0]); err != nil {
		return plugin.Error("nodecache", c.Errf("%q: want HOST:PORT: %v", args[0], err))
	}
	var search []string
	for _, d := range args[1:] {
		search = append(search, strings.ToLower(dns.Fqdn(d)))
	}
	if c.NextBlock() || c.Next() {
		return plugin.Error("nodecache", c.ArgErr())
	}
	cache := New(args[0], search)
	c.OnFinalShutdown(func() error { cache.Close(); return nil })
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		cache.Next = next
		return cache
	})
	return nil
}
