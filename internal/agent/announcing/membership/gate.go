package membership

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// gate admits traffic from nodes' addresses and nothing else: a holder of the key may be anywhere.
//
// Rejected: memberlist's own CIDRsAllowed. It is applied to alive messages but not to dead ones, and it cannot be changed
// while the member runs, as nodes come and go.
type gate struct {
	log  *slog.Logger
	port uint16 // of all members

	mu    sync.Mutex
	nodes map[string][]netip.Addr
	addrs map[netip.Addr]bool
	told  map[netip.Addr]bool // rejected sources that were logged
}

// set replaces the set of nodes.
func (g *gate) set(nodes map[string][]netip.Addr) {
	addrs := map[netip.Addr]bool{}
	for _, list := range nodes {
		for _, a := range list {
			addrs[a] = true
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nodes, g.addrs = nodes, addrs
}

// admits reports whether a source address is a node's.
func (g *gate) admits(from net.Addr) bool {
	var addr netip.Addr
	if at, err := netip.ParseAddrPort(from.String()); err == nil {
		addr = at.Addr().Unmap().WithZone("")
	}
	const most = 64 // logged sources: UDP source addresses are free to forge
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.addrs[addr] {
		return true
	}
	if !g.told[addr] && len(g.told) < most {
		g.told[addr] = true
		g.log.Warn("rejected traffic to the membership port from an address that is not a node's", "address", addr)
	}
	return false
}

// NotifyAlive implements memberlist.AliveDelegate. It admits a member only if it has the name of a node and an address of
// that very node. memberlist also calls it for members that other members report.
func (g *gate) NotifyAlive(n *memberlist.Node) error {
	addr, _ := netip.AddrFromSlice(n.Addr)
	addr = addr.Unmap()
	g.mu.Lock()
	defer g.mu.Unlock()
	if at := netip.AddrPortFrom(addr, n.Port); n.Port != g.port || !slices.Contains(g.nodes[n.Name], addr) {
		return fmt.Errorf("no node %s has the address %s", n.Name, at)
	}
	return nil
}

// transport is memberlist's own transport behind a gate.
type transport struct {
	*memberlist.NetTransport
	gate    *gate
	own     netip.Addr
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	end     sync.Once
}

func newTransport(c *memberlist.NetTransportConfig, own netip.Addr, g *gate) (*transport, error) {
	inner, err := memberlist.NewNetTransport(c)
	if err != nil {
		return nil, err
	}
	t := &transport{NetTransport: inner, gate: g, own: own, packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), done: make(chan struct{})}
	go t.pass()
	return t, nil
}

// pass passes on what the gate admits. memberlist's transport blocks on a channel that is not read, so pass reads to the
// end.
func (t *transport) pass() {
	for {
		select {
		case <-t.done:
			return
		case p := <-t.NetTransport.PacketCh():
			if !t.gate.admits(p.From) {
				continue
			}
			select {
			case t.packets <- p:
			case <-t.done:
				return
			}
		case s := <-t.NetTransport.StreamCh():
			if !t.gate.admits(s.RemoteAddr()) {
				s.Close()
				continue
			}
			select {
			case t.streams <- s:
			case <-t.done:
				s.Close()
				return
			}
		}
	}
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streams }

// DialTimeout and DialAddressTimeout connect from the member's own address: the node may have other addresses, which other
// members do not know.
func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(t.own, 0))}
	return d.Dial("tcp", addr)
}

func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

func (t *transport) Shutdown() error {
	t.end.Do(func() { close(t.done) })
	// A packet that waits to be passed on would keep memberlist's own listeners from ending.
	ended := make(chan struct{})
	go func() {
		for {
			select {
			case <-t.NetTransport.PacketCh():
			case s := <-t.NetTransport.StreamCh():
				s.Close()
			case <-ended:
				return
			}
		}
	}()
	defer close(ended)
	return t.NetTransport.Shutdown()
}
