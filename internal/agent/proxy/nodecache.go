package proxy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// nodeCaches knows which of the node's DNS caches answer. It queries one cache per address every second over a TCP
// connection that stays open: when the cache's process ends, the kernel closes the connection, and that is noticed at once.
type nodeCaches struct {
	log     *slog.Logger
	changed func()
	port    uint16

	addrs []netip.Addr // those watched; only set uses it
	stop  context.CancelFunc
	tasks sync.WaitGroup

	mu sync.Mutex
	up []netip.Addr
}

// set makes it watch the caches at these addresses and no others.
func (n *nodeCaches) set(ctx context.Context, addrs []netip.Addr) {
	if slices.Equal(addrs, n.addrs) {
		return
	}
	n.close()
	ctx, n.stop = context.WithCancel(ctx)
	n.addrs = addrs
	for _, addr := range addrs {
		n.tasks.Go(func() { n.watch(ctx, addr) })
	}
}

// close stops watching.
func (n *nodeCaches) close() {
	if n.stop != nil {
		n.stop()
		n.tasks.Wait()
		n.stop = nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.addrs, n.up = nil, nil
}

// answering returns the addresses of the caches that answer, sorted.
func (n *nodeCaches) answering() []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.up)
}

// How caches are queried.
const (
	askInterval = time.Second
	// askTimeout leaves time to a busy cache. Two queries in a row without an answer mean that it is down.
	askTimeout = 500 * time.Millisecond
	// absentInterval is how often a cache that does not answer is tried.
	absentInterval = 200 * time.Millisecond
)

func (n *nodeCaches) watch(ctx context.Context, addr netip.Addr) {
	var conn net.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close()
		}
	}()
	misses := 0
	for id := uint16(1); ctx.Err() == nil; id++ {
		var err error
		if conn == nil {
			conn, err = (&net.Dialer{Timeout: askTimeout}).DialContext(ctx, "tcp", netip.AddrPortFrom(addr, n.port).String())
		}
		if err == nil {
			if err = askVersion(conn, id); err != nil {
				_ = conn.Close()
				conn = nil
			}
		}
		if ctx.Err() != nil {
			return
		}
		var timeout net.Error
		switch {
		case err == nil:
			misses = 0
			n.tell(addr, nil)
			if ended(ctx, conn, askInterval) {
				_ = conn.Close()
				conn = nil // another instance may be listening: try it before reporting anything
			}
			continue
		case errors.As(err, &timeout) && timeout.Timeout():
			misses++
		case misses == 0 && !isRefused(err):
			misses++ // the connection ended; the result on a new one counts
			continue
		default:
			misses = 2
		}
		if misses >= 2 {
			n.tell(addr, err)
			select {
			case <-ctx.Done():
			case <-time.After(absentInterval):
			}
		}
	}
}

func isRefused(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial"
}

// tell records whether the cache answers.
func (n *nodeCaches) tell(addr netip.Addr, err error) {
	n.mu.Lock()
	i, was := slices.BinarySearchFunc(n.up, addr, netip.Addr.Compare)
	switch {
	case err == nil && !was:
		n.up = slices.Insert(slices.Clone(n.up), i, addr)
	case err != nil && was:
		n.up = slices.Delete(slices.Clone(n.up), i, i+1)
	}
	n.mu.Unlock()
	switch {
	case err == nil && !was:
		n.log.Info("the node's DNS cache answers; pods use it", "address", addr)
		n.changed()
	case err != nil && was:
		n.log.Warn("the node's DNS cache does not answer; pods use the cluster's DNS servers", "address", addr, "error", err)
		n.changed()
	}
}

// ended waits for the given time. It returns true at once if the other side closes the connection before that.
func ended(ctx context.Context, conn net.Conn, wait time.Duration) bool {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(wait))
	_, err := conn.Read(make([]byte, 1))
	var timeout net.Error
	return err == nil || !errors.As(err, &timeout) || !timeout.Timeout() // data without a query is a fault as well
}

// askVersion queries what every server answers without an upstream: TXT version.bind of class CHAOS. Any answer will do.
func askVersion(conn net.Conn, id uint16) error {
	query := []byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	query = append(query, "\x07version\x04bind\x00\x00\x10\x00\x03"...)
	binary.BigEndian.PutUint16(query, uint16(len(query)-2)) // the length prefix of DNS over TCP
	binary.BigEndian.PutUint16(query[2:], id)
	if err := conn.SetDeadline(time.Now().Add(askTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write(query); err != nil {
		return err
	}
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return err
	}
	answer := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if len(answer) < 12 || binary.BigEndian.Uint16(answer) != id || answer[2]&0x80 == 0 {
		return fmt.Errorf("not a DNS answer: % x", answer[:min(len(answer), 12)])
	}
	return nil
}
