// Package share divides a fixed number of places among clients, so that one that takes all it can get leaves room for
// the others: questions on their way to the servers, requests that wait, connections.
//
// The rule is that of dynamic thresholds (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet
// Switches", 1998): a client may have as many places as are free. A greedy client alone stops at half of them, two at a
// third each, n at 1/(n+1) each, and so much stays free for whoever comes next. A fixed share for each client was
// rejected: it has to be small enough for the number of pods that a node can have, 110 and more, and is then too small
// for the one that is busy while the others sleep.
//
// Clients that have no place take no memory, so there are never more of them than places, however many addresses
// somebody asks from.
package share

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// Why there is no place for a client.
var (
	// ErrClient says that the client has its share already, while others still get places.
	ErrClient = errors.New("this client has its share")
	// ErrAll says that all places are taken.
	ErrAll = errors.New("there is no place for any client")
)

// Places are what clients share. Its methods may be called from several goroutines.
type Places struct {
	size  int
	taken atomic.Int64 // changed under mu, and read without it: who looks at it never holds up who takes

	mu sync.Mutex
	of map[netip.Addr]int
}

// New returns so many places.
func New(size int) *Places { return &Places{size: size, of: map[netip.Addr]int{}} }

// Take gives a client a place. The error is ErrClient or ErrAll.
func (p *Places) Take(client netip.Addr) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	free := p.size - int(p.taken.Load())
	switch has := p.of[client]; {
	case free <= 0:
		return ErrAll
	case has >= free:
		return ErrClient
	default:
		p.of[client] = has + 1
		p.taken.Add(1)
		return nil
	}
}

// Leave gives a place of the client's back.
func (p *Places) Leave(client netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch has := p.of[client]; has {
	case 0:
		return
	case 1:
		delete(p.of, client)
	default:
		p.of[client] = has - 1
	}
	p.taken.Add(-1)
}

// Taken is the number of places that clients have. It takes no lock.
func (p *Places) Taken() int { return int(p.taken.Load()) }

// Clients is the number of clients that have places.
func (p *Places) Clients() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.of)
}

// Client is what a client is known by: its IP address, without a port, and IPv4 as such even if it came to an IPv6
// socket. All that has no IP address is one client.
func Client(a net.Addr) netip.Addr {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Addr().Unmap()
	case *net.TCPAddr:
		return a.AddrPort().Addr().Unmap()
	default:
		return netip.Addr{}
	}
}
