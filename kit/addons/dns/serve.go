package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/reuseport"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fathom-network/fathom/kit/addons/dns/nodecache"
	"github.com/fathom-network/fathom/kit/addons/dns/share"
)

// How many connections and requests there may be at once; one client has half of them at most (package share).
const (
	maxConns = 512 // of DNS over TCP, each with a query of 64 KiB at most
	// A server of metrics or health has few clients, and each request costs more than a query does.
	maxHTTPConns    = 32
	maxHTTPRequests = 4
)

// How long clients may take. How long they may take to ask is up to CoreDNS: three seconds for the first query of a
// connection, ten for the next.
const (
	writeTimeout     = 5 * time.Second
	httpReadTimeout  = 5 * time.Second
	httpWriteTimeout = 10 * time.Second
	httpIdleTimeout  = 30 * time.Second
	// graceTime is for what is under way at the end: less than kubelet waits (terminationGracePeriodSeconds).
	graceTime = 3 * time.Second
)

// configure has CoreDNS read its configuration. caddy.Start would do that, and listen as well; but it takes connections
// without end, and neither CoreDNS nor the DNS library gives up on a client that does not read (the library's
// Server.WriteTimeout is used nowhere, 1.1.72). So the sockets are ours, and this is the part of caddy.Start before it
// opens them.
func (o options) configure() (*dnsserver.Config, *nodecache.NodeCache, error) {
	var config *dnsserver.Config
	var cache *nodecache.NodeCache
	caddy.RegisterPlugin("nodecache", caddy.Plugin{ServerType: "dns", Action: func(c *caddy.Controller) (err error) {
		config = dnsserver.GetConfig(c)
		cache, err = nodecache.Setup(c)
		return err
	}})
	// Its place is that of cache, which it stands for.
	for i, d := range dnsserver.Directives {
		if d == "cache" {
			dnsserver.Directives[i] = "nodecache"
		}
	}
	input := caddy.CaddyfileInput{Contents: []byte(o.corefile()), Filepath: "fathom-dns", ServerTypeName: "dns"}
	if err := caddy.ValidateAndExecuteDirectives(input, nil, true); err != nil {
		return nil, nil, fmt.Errorf("read the configuration: %w", err)
	}
	return config, cache, nil
}

// serve answers until the context ends.
func (o options) serve(ctx context.Context) error {
	log.SetOutput(os.Stdout)
	log.SetFlags(coremain.LogFlags)
	config, cache, err := o.configure()
	if err != nil {
		return err
	}
	var begin []func() error
	var end []func(context.Context) error
	conns := share.New(maxConns)
	for _, addr := range o.Listen {
		at := netip.AddrPortFrom(addr, uint16(o.Port))
		tcp, err := whenFree(ctx, func() (net.Listener, error) { return reuseport.Listen("tcp", at.String()) })
		if err != nil {
			return err
		}
		udp, err := listenPackets(ctx, at)
		if err != nil {
			return err
		}
		// A server has one socket of each kind, so there are as many servers, and the first has the listener, too.
		for i, packets := range udp {
			server, err := dnsserver.NewServer(transport.DNS+"://"+at.String(), []*dnsserver.Config{config})
			if err != nil {
				return fmt.Errorf("make the server at %s: %w", at, err)
			}
			if i == 0 {
				for _, p := range config.Handlers() {
					vars.PluginEnabled.WithLabelValues(server.Addr, config.Zone, config.ViewName, p.Name()).Set(1)
				}
				limited := &listener{Listener: tcp, places: conns, refused: nodecache.RefusedConnection}
				begin = append(begin, func() error { return server.Serve(limited) })
				server.OnStartupComplete()
			}
			begin = append(begin, func() error { return server.ServePacket(packets) })
			end = append(end, func(context.Context) error { return server.Stop() })
		}
	}
	// Health comes last: who is asked answers all else already.
	for _, h := range []struct {
		addr, path string
		handler    http.Handler
	}{
		{o.Metrics, "/metrics", promhttp.HandlerFor(prometheus.DefaultGatherer, promhttp.HandlerOpts{})},
		{o.Health, "/health", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("OK")) })},
	} {
		l, err := whenFree(ctx, func() (net.Listener, error) { return reuseport.Listen("tcp", h.addr) })
		if err != nil {
			return err
		}
		server := newHTTPServer(h.path, h.handler)
		begin = append(begin, func() error { return server.Serve(&listener{Listener: l, places: share.New(maxHTTPConns)}) })
		end = append(end, server.Shutdown)
	}

	failed := make(chan error, len(begin))
	for _, f := range begin {
		go func() { failed <- f() }()
	}
	select {
	case err = <-failed:
		err = fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
	defer cancel()
	cache.Close() // first, or the servers would wait for those that wait for the cache
	var wg sync.WaitGroup
	for _, f := range end {
		wg.Go(func() { _ = f(grace) })
	}
	wg.Wait()
	return err
}

// newHTTPServer serves one page to few at once. Each request has its own answer ready before it writes the first byte.
func newHTTPServer(path string, page http.Handler) *http.Server {
	places := share.New(maxHTTPRequests)
	mux := http.NewServeMux()
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		// Only for a connection that is no TCP connection has the address another form.
		addr, _ := net.ResolveTCPAddr("tcp", r.RemoteAddr)
		client := share.Client(addr)
		if err := places.Take(client); err != nil {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "too many requests at once: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		defer places.Leave(client)
		page.ServeHTTP(w, r)
	})
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: httpReadTimeout, ReadTimeout: httpReadTimeout, WriteTimeout: httpWriteTimeout,
		IdleTimeout: httpIdleTimeout, MaxHeaderBytes: 8 << 10,
	}
}

// whenFree opens a socket, and waits while another process has its port. One of the same user has not: both listen, as is
// meant in an update (SO_REUSEPORT). But the kernel lets no two users share a port, and a fathom-dns of an older
// version is root's. kubelet takes its answers to health checks for ours and ends it; until then this one must be
// there, for it would not be started again at once.
func whenFree[S any](ctx context.Context, open func() (S, error)) (S, error) {
	for told := false; ; {
		s, err := open()
		if !errors.Is(err, syscall.EADDRINUSE) {
			return s, err
		}
		if !told {
			told = true
			fmt.Fprintf(os.Stderr, "fathom-dns: %v: waiting for the process of another user that has it\n", err)
		}
		select {
		case <-ctx.Done():
			return s, context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// listener takes connections while their clients have places, and ends others at once.
type listener struct {
	net.Listener
	places  *share.Places
	refused func(error) // counts them, if it is not nil
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		client := share.Client(c.RemoteAddr())
		if err = l.places.Take(client); err == nil {
			return &conn{Conn: c, leave: sync.OnceFunc(func() { l.places.Leave(client) })}, nil
		}
		if l.refused != nil {
			l.refused(err)
		}
		if t, ok := c.(*net.TCPConn); ok {
			_ = t.SetLinger(0) // nothing of it is to stay in the kernel, either
		}
		_ = c.Close()
	}
}

// conn has a place, and is ended if what it writes is not read.
type conn struct {
	net.Conn
	leave func()
}

func (c *conn) Write(p []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		_ = c.Close() // part of a message may be out: nothing that follows would make sense
	}
	return n, err
}

func (c *conn) Close() error {
	c.leave()
	return c.Conn.Close()
}
