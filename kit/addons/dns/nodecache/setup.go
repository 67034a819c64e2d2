package nodecache

import (
	"net"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
)

// Setup reads `nodecache HOST:PORT [SEARCH-DOMAIN...]`, and makes the cache that it says.
func Setup(c *caddy.Controller) (*NodeCache, error) {
	c.Next()
	args := c.RemainingArgs()
	if len(args) == 0 {
		return nil, plugin.Error("nodecache", c.ArgErr())
	}
	if _, _, err := net.SplitHostPort(args[0]); err != nil {
		return nil, plugin.Error("nodecache", c.Errf("%q: want HOST:PORT: %v", args[0], err))
	}
	var search []string
	for _, d := range args[1:] {
		search = append(search, strings.ToLower(dns.Fqdn(d)))
	}
	if c.NextBlock() || c.Next() {
		return nil, plugin.Error("nodecache", c.ArgErr())
	}
	cache := New(args[0], search)
	cache.measure()
	dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
		cache.Next = next
		return cache
	})
	return cache, nil
}
