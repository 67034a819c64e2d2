package service

import (
	"net/netip"
	"slices"
	"time"
)

// Balanced is a frontend in the form in which the programs at connect() hold it.
type Balanced struct {
	Key                        // 127.0.0.1 and ::1 stand for all loopback addresses of the node itself
	Endpoints []netip.AddrPort // without any, connect() fails; for UDP to a loopback address it is the node port at the node's own address
	ID        uint32           // ID
	Affinity  time.Duration    // in whole seconds
	PodsOnly  bool             // it is not for sockets of the node's own network namespace
}

// Equal says whether two are the same.
func (b Balanced) Equal(o Balanced) bool {
	return b.Key == o.Key && b.ID == o.ID && b.Affinity == o.Affinity && b.PodsOnly == o.PodsOnly && slices.Equal(b.Endpoints, o.Endpoints)
}

// loopbackOf returns the address that stands for all loopback addresses of a family in the map.
func loopbackOf(v4 bool) netip.Addr {
	if v4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}) // for all of 127.0.0.0/8
	}
	return netip.IPv6Loopback()
}

// BalancedOf returns the frontends of a plan that are balanced at connect(), sorted by key. The others are left to the rules for
// packets, since only those can check a source (Sources) and drop a packet without an answer (Drop).
func BalancedOf(p Plan) []Balanced {
	frontends := ByKey(p.Frontends)
	var all []Balanced
	for _, f := range p.Frontends {
		for _, k := range KeysAtConnect(f, p.NodePortAddrs) {
			if b, found := BalancedAt(frontends, p.NodePortAddrs, k); found {
				all = append(all, b)
			}
		}
	}
	slices.SortFunc(all, func(a, b Balanced) int { return a.Compare(b.Key) })
	return slices.CompactFunc(all, func(a, b Balanced) bool { return a.Key == b.Key })
}

// KeysAtConnect returns the keys at which sockets may reach a frontend. A node port has one for each address of the node.
func KeysAtConnect(f Frontend, nodePortAddrs []netip.Addr) []Key {
	if f.Protocol != TCP && f.Protocol != UDP {
		return nil
	}
	return KeysOf(f, nodePortAddrs)
}

// KeysOf returns the keys by which a process on the node may reach a frontend. A node port has one for each address of the node
// and, as the last, one for the loopback addresses, which no other frontend has.
func KeysOf(f Frontend, nodePortAddrs []netip.Addr) []Key {
	if !f.Addr.IsUnspecified() {
		return []Key{f.Key}
	}
	var keys []Key
	for _, a := range nodePortAddrs {
		if a.Is4() == f.Addr.Is4() {
			keys = append(keys, Key{Addr: a, Protocol: f.Protocol, Port: f.Port})
		}
	}
	return append(keys, Key{Addr: loopbackOf(f.Addr.Is4()), Protocol: f.Protocol, Port: f.Port})
}

// ByKey returns frontends by their keys.
func ByKey(frontends []Frontend) map[Key]Frontend {
	m := make(map[Key]Frontend, len(frontends))
	for _, f := range frontends {
		m[f.Key] = f
	}
	return m
}

// BalancedAt returns what sockets reach at a key. A frontend with exactly this address takes precedence over a node port, even
// if the rules for packets serve it.
func BalancedAt(frontends map[Key]Frontend, nodePorts []netip.Addr, k Key) (Balanced, bool) {
	f, found := frontends[k]
	if !found && (k.Addr == loopbackOf(k.Addr.Is4()) || slices.Contains(nodePorts, k.Addr)) {
		any := netip.IPv6Unspecified()
		if k.Addr.Is4() {
			any = netip.IPv4Unspecified()
		}
		f, found = frontends[Key{Addr: any, Protocol: k.Protocol, Port: k.Port}]
	}
	if !found || f.Sources != nil || len(f.Inside.Endpoints) == 0 && f.Inside.Drop {
		return Balanced{}, false
	}
	if k.Protocol == UDP && f.Addr.IsUnspecified() && k.Addr.IsLoopback() {
		// At the node's own address rules for packets serve the node port, and move connected sockets from endpoint to endpoint.
		if i := slices.IndexFunc(nodePorts, func(a netip.Addr) bool { return a.Is4() == k.Addr.Is4() }); i >= 0 {
			return Balanced{Key: k, Endpoints: []netip.AddrPort{netip.AddrPortFrom(nodePorts[i], k.Port)}, ID: ID(f.Service)}, true
		}
	}
	b := Balanced{Key: k, Endpoints: f.Inside.Endpoints, ID: ID(f.Service), Affinity: f.Affinity.Truncate(time.Second), PodsOnly: f.PodsOnly}
	if f.Affinity > 0 {
		b.Affinity = max(b.Affinity, time.Second)
	}
	if !slices.IsSortedFunc(b.Endpoints, netip.AddrPort.Compare) { // the programs use binary search
		b.Endpoints = slices.SortedFunc(slices.Values(b.Endpoints), netip.AddrPort.Compare)
	}
	return b, true
}
