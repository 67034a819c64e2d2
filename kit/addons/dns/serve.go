package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
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
	// leadAwayTime is for queries that come when the cache has gone already, for who is led to it: longer than the agent
	// takes.
	leadAwayTime = 300 * time.Millisecond
)

// coreDNS reads configurations. caddy.Start would do that, and listen as well; but it takes connections without end, and
// neither CoreDNS nor the DNS library gives up on a client that does not read (the library's Server.WriteTimeout is used
// nowhere, 1.1.72). So the sockets are ours, and this is the part of caddy.Start before it opens them.
type coreDNS struct {
	config *dnsserver.Config
	cache  *nodecache.NodeCache
}

// newCoreDNS makes nodecache one of CoreDNS's plugins. That can be done once.
func newCoreDNS() *coreDNS {
	d := &coreDNS{}
	caddy.RegisterPlugin("nodecache", caddy.Plugin{ServerType: "dns", Action: func(c *caddy.Controller) (err error) {
		d.config = dnsserver.GetConfig(c)
		d.cache, err = nodecache.Setup(c)
		return err
	}})
	// Its place is that of cache, which it stands for.
	for i, name := range dnsserver.Directives {
		if name == "cache" {
			dnsserver.Directives[i] = "nodecache"
		}
	}
	return d
}

// configure has CoreDNS read a configuration, and makes a cache that knows nothing yet.
func (d *coreDNS) configure(corefile string) error {
	input := caddy.CaddyfileInput{Contents: []byte(corefile), Filepath: "fathom-dns", ServerTypeName: "dns"}
	if err := caddy.ValidateAndExecuteDirectives(input, nil, true); err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	return nil
}

// serve answers until the context ends, whenever answers do not depend on who asks.
func (o options) serve(ctx context.Context) error {
	log.SetOutput(os.Stdout)
	log.SetFlags(coremain.LogFlags)
	d := newCoreDNS()
	ctx, fail := context.WithCancelCause(ctx)
	pages := &pages{fail: fail}
	defer pages.close()
	why := o.personal()
	for {
		nodecache.Aside(why != "")
		if why != "" {
			log.Printf("[WARNING] This cache does not answer, and pods ask the cluster's DNS servers themselves: %s", why)
			if err := pages.open(ctx, o, why); err != nil {
				return err
			}
			if !o.until(ctx, func(now string) bool { return now == "" }) {
				return pages.failed(ctx)
			}
			log.Printf("[INFO] What the cluster's DNS servers answer does not depend on who asks any more, and this cache answers")
			nodecache.Aside(false)
		}
		alike, end := context.WithCancelCause(ctx)
		go o.until(alike, func(now string) bool {
			if now != "" {
				end(errAside(now))
			}
			return now != ""
		})
		err := o.answer(alike, d, func() error { return pages.open(ctx, o, "") })
		end(nil)
		var aside errAside
		switch {
		case err != nil && !errors.As(err, &aside):
			return err
		case !errors.As(context.Cause(alike), &aside):
			return pages.failed(ctx)
		}
		why = string(aside)
	}
}

// answer answers until the context ends. opened is called when it begins to.
func (o options) answer(ctx context.Context, d *coreDNS, opened func() error) error {
	if err := d.configure(o.corefile()); err != nil {
		return err
	}
	defer d.cache.Close()
	var begin []func() error
	var streams, packets []*dnsserver.Server
	var sockets []io.Closer
	fail := func(err error) error {
		for _, s := range sockets {
			_ = s.Close()
		}
		return err
	}
	conns := share.New(maxConns)
	for _, addr := range o.Listen {
		at := netip.AddrPortFrom(addr, uint16(o.Port))
		tcp, err := whenFree(ctx, func() (net.Listener, error) { return reuseport.Listen("tcp", at.String()) })
		if err != nil {
			return fail(err)
		}
		sockets = append(sockets, tcp)
		udp, err := listenPackets(ctx, at)
		if err != nil {
			return fail(err)
		}
		for _, s := range udp {
			sockets = append(sockets, s)
		}
		// A server has one socket of each kind, so there are as many servers, and one for TCP.
		server := func() (*dnsserver.Server, error) {
			s, err := dnsserver.NewServer(transport.DNS+"://"+at.String(), []*dnsserver.Config{d.config})
			if err != nil {
				return nil, fail(fmt.Errorf("make the server at %s: %w", at, err))
			}
			return s, nil
		}
		stream, err := server()
		if err != nil {
			return err
		}
		for _, p := range d.config.Handlers() {
			vars.PluginEnabled.WithLabelValues(stream.Addr, d.config.Zone, d.config.ViewName, p.Name()).Set(1)
		}
		limited := &listener{Listener: tcp, places: conns, refused: nodecache.RefusedConnection}
		begin = append(begin, func() error { return stream.Serve(limited) })
		streams = append(streams, stream)
		stream.OnStartupComplete()
		for _, s := range udp {
			server, err := server()
			if err != nil {
				return err
			}
			begin = append(begin, func() error { return server.ServePacket(s) })
			packets = append(packets, server)
		}
	}
	// Health comes last: who is asked answers all else already.
	if err := opened(); err != nil {
		return fail(err)
	}
	failed := make(chan error, len(begin))
	for _, f := range begin {
		go func() { failed <- f() }()
	}
	var err error
	select {
	case err = <-failed:
		err = fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
		var aside errAside
		if errors.As(context.Cause(ctx), &aside) {
			// The agent's connection ends, and it leads pods away at once. What comes here in the meantime is answered.
			go stop(streams)
			time.Sleep(leadAwayTime)
		}
	}
	d.cache.Close() // first, or the servers would wait for those that wait for the cache
	stop(append(streams, packets...))
	_ = fail(nil) // what has not begun is not to begin any more
	return err
}

// stop ends servers, and waits for what they have under way, but no longer than CoreDNS's own time for that.
func stop(servers []*dnsserver.Server) {
	var wg sync.WaitGroup
	for _, s := range servers {
		wg.Go(func() { _ = s.Stop() })
	}
	wg.Wait()
}

// pages are what is there by HTTP, once it is open.
type pages struct {
	fail    context.CancelCauseFunc // is told when one cannot be served any more
	servers []*http.Server
	aside   atomic.Pointer[string] // why the cache does not answer
}

// errPage says that a page cannot be served.
type errPage struct{ error }

// failed returns the error for which the context has ended, if that was a page's.
func (*pages) failed(ctx context.Context) error {
	var page errPage
	if errors.As(context.Cause(ctx), &page) {
		return page.error
	}
	return nil
}

// open serves them, and says with the health why the cache does not answer; it is none the less in health.
func (p *pages) open(ctx context.Context, o options, aside string) error {
	p.aside.Store(&aside)
	if p.servers != nil {
		return nil
	}
	health := func(w http.ResponseWriter, _ *http.Request) {
		text := "OK"
		if aside := *p.aside.Load(); aside != "" {
			text += ", and does not answer: " + aside
		}
		_, _ = io.WriteString(w, text)
	}
	for _, h := range []struct {
		addr, path string
		handler    http.Handler
	}{
		{o.Metrics, "/metrics", promhttp.HandlerFor(prometheus.DefaultGatherer, promhttp.HandlerOpts{})},
		{o.Health, "/health", http.HandlerFunc(health)},
	} {
		l, err := whenFree(ctx, func() (net.Listener, error) { return reuseport.Listen("tcp", h.addr) })
		if err != nil {
			return err
		}
		server := newHTTPServer(h.path, h.handler)
		go func() {
			if err := server.Serve(&listener{Listener: l, places: share.New(maxHTTPConns)}); !errors.Is(err, http.ErrServerClosed) {
				p.fail(errPage{fmt.Errorf("serve %s at %s: %w", h.path, h.addr, err)})
			}
		}()
		p.servers = append(p.servers, server)
	}
	return nil
}

// close ends them when what they have under way is answered, or graceTime is over.
func (p *pages) close() {
	grace, cancel := context.WithTimeout(context.Background(), graceTime)
	defer cancel()
	var wg sync.WaitGroup
	for _, s := range p.servers {
		wg.Go(func() { _ = s.Shutdown(grace) })
	}
	wg.Wait()
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
