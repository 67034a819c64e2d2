package kube

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// dialer remembers the connections to the API server. When the address goes that one was made from, nothing tells it so:
// no packet is lost visibly, none comes any more, and a watch hangs until HTTP/2 misses an answer, which is 45 seconds.
type dialer struct {
	net.Dialer

	mu    sync.Mutex
	conns map[*conn]struct{}
}

type conn struct {
	net.Conn
	of *dialer
}

func newDialer() *dialer {
	return &dialer{Dialer: net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}, conns: map[*conn]struct{}{}} // as client-go's own
}

// DialContext is net.Dialer's.
func (d *dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	made, err := d.Dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &conn{made, d}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[c] = struct{}{}
	return c, nil
}

// Close is net.Conn's.
func (c *conn) Close() error {
	c.of.mu.Lock()
	delete(c.of.conns, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}

// CutFrom closes the connections to the API server whose local address is gone, and returns how many. Requests that wait on
// such a connection, as watches do, fail and are made again from another address.
func (c *Client) CutFrom(gone func(netip.Addr) bool) int {
	c.dialer.mu.Lock()
	var dead []*conn
	for k := range c.dialer.conns {
		if from, ok := k.LocalAddr().(*net.TCPAddr); ok && gone(from.AddrPort().Addr().Unmap().WithZone("")) {
			dead = append(dead, k)
		}
	}
	c.dialer.mu.Unlock()
	for _, k := range dead {
		_ = k.Close()
	}
	return len(dead)
}
