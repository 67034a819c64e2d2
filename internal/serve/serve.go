// Package serve is how Fathom's programs answer over HTTP: the kubelet's probes, Prometheus, and the plugin's questions.
// Whoever reaches a port can hold it up only so far: everything about a request has a time limit, and connections and
// scrapes have a number.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Options are what a server is told.
type Options struct {
	// Network is "tcp" or "unix", Address what net.Listen takes.
	Network, Address string
	Handler          http.Handler
	Log              *slog.Logger
	// TLS, if set, has the server speak nothing else.
	TLS *tls.Config
	// Write bounds what an answer may take, from the end of the request's header; zero is WriteTimeout.
	Write time.Duration
}

// The limits of all servers.
const (
	// HeaderTimeout is for a request's header, ReadTimeout for all of it.
	HeaderTimeout = 5 * time.Second
	ReadTimeout   = 10 * time.Second
	// WriteTimeout is for an answer, the reader's slowness included.
	WriteTimeout = 20 * time.Second
	// IdleTimeout is how long a connection waits for its next request: longer than scrapes are usually apart.
	IdleTimeout = 90 * time.Second
	// headerBytes is far more than a probe or a scrape sends, a token included.
	headerBytes = 16 << 10
	// Connections that are open at once over TCP, and those of one client's address. The kubelet and a Prometheus use one
	// each.
	connections       = 64
	connectionsOfEach = 16
)

// Listen answers until stop is called. The error says that the address cannot be listened at.
func Listen(ctx context.Context, o Options) (stop func(), err error) {
	l, err := new(net.ListenConfig).Listen(ctx, o.Network, o.Address)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", o.Address, err)
	}
	if o.Network == "tcp" {
		l = &limited{Listener: l, open: map[string]int{}}
	}
	if o.TLS != nil {
		l = tls.NewListener(l, o.TLS)
	}
	s := &http.Server{
		Handler: o.Handler, ReadHeaderTimeout: HeaderTimeout, ReadTimeout: ReadTimeout, WriteTimeout: o.Write, IdleTimeout: IdleTimeout,
		MaxHeaderBytes: headerBytes,
		ErrorLog:       slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug), // what strangers do wrong at a port is no news
	}
	if s.WriteTimeout == 0 {
		s.WriteTimeout = WriteTimeout
	}
	go func() {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			o.Log.Error("a listener ended", "address", o.Address, "error", err)
		}
	}()
	return func() { _ = s.Close() }, nil
}

// limited is a listener that closes connections at once which are too many. It does not leave them in the queue: there,
// one client's would keep others waiting.
type limited struct {
	net.Listener

	mu   sync.Mutex
	open map[string]int // connections, by the client's address
	all  int
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		client, _, err := net.SplitHostPort(c.RemoteAddr().String())
		if err == nil && l.enter(client) {
			return &limitedConn{Conn: c, leave: sync.OnceFunc(func() { l.leave(client) })}, nil
		}
		c.Close()
	}
}

func (l *limited) enter(client string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all >= connections || l.open[client] >= connectionsOfEach {
		return false
	}
	l.open[client]++
	l.all++
	return true
}

func (l *limited) leave(client string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all--
	if l.open[client]--; l.open[client] == 0 {
		delete(l.open, client)
	}
}

type limitedConn struct {
	net.Conn
	leave func()
}

func (c *limitedConn) Close() error {
	c.leave()
	return c.Conn.Close()
}
