package service

import (
	"net/netip"
	"slices"
	"time"
)

// Balanced is a frontend as sockets meet it.
type Balanced struct {
	Key                        // at 127.0.0.1 and ::1, it is met at all loopback addresses of the node itself
	Endpoints []netip.AddrPort // none is a refusal; of UDP at a loopback address it is the node port at the node's own
	ID        uint32           // ID
	Affinity  time.Duration    // in whole seconds
	PodsOnly  bool             // sockets of the node's own network namespace do not meet it
}

// Equal says whether two are the same.
func (b Balanced) Equal(o Balanced) bool {
	return b.Key == o.Key && b.ID == o.ID && b.Affinity == o.Affinity && b.PodsOnly == o.PodsOnly && slices.Equal(b.Endpoints, o.Endpoints)
}

// loopbackOf is the address by which node ports at loopback addresses of a family are in the map.
func loopbackOf(v4 bool) netip.Addr {
	if v4 {
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}) // for all of 127.0.0.0/8
	}
	return netip.IPv6Loopback()
}

// BalancedOf are the frontends of a plan that are balanced at connect(), sorted by key. The others are left to rules
// for packets, for only these know: whether a source may come (Sources), and what to do with a packet that nobody
// shall answer (Drop).
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

// KeysAtConnect returns the keys at which sockets may meet a frontend: of a node port, one for each address of the node.
func KeysAtConnect(f Frontend, nodePortAddrs []netip.Addr) []Key {
	if f.Protocol != TCP && f.Protocol != UDP {
		return nil
	}
	return KeysOf(f, nodePortAddrs)
}

// KeysOf returns the keys by which a process on the node may meet a frontend: of a node port, one for each address of the node
// and, as the last, that of its loopback addresses, which are nobody else's.
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

// ByKey finds frontends by their keys.
func ByKey(frontends []Frontend) map[Key]Frontend {
	m := make(map[Key]Frontend, len(frontends))
	for _, f := range frontends {
		m[f.Key] = f
	}
	return m
}

// BalancedAt is what sockets meet at a key. A frontend of just this address goes before a node port, also if it is left
// to rules for packets.
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
	if !slices.IsSortedFunc(b.Endpoints, netip.AddrPort.Compare) { // the programs search
		b.Endpoints = slices.SortedFunc(slices.Values(b.Endpoints), netip.AddrPort.Compare)
	}
	return b, true
}
