package bpf

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// These are what the maps of c/connect.c hold.
type (
	frontendKey struct {
		Address  pin.Key
		Port     [2]byte
		Protocol service.Protocol
		Unused   uint8
	}
	serviceValue struct{ Set, Count, ID, Affinity, PodsOnly uint32 }
	slotKey      struct{ Set, Number uint32 }
	endpoint     struct {
		Address pin.Key
		Port    [2]byte
		Unused  [2]byte
	}
	peerValue struct {
		To endpoint
		As frontendKey
	}
)

// Places in the map pin.Node.
const (
	nodeNetns   = uint32(0)
	nodeLastSet = uint32(1)
)

func keyOf(k service.Key) frontendKey {
	f := frontendKey{Address: pin.KeyOf(k.Addr), Protocol: k.Protocol}
	binary.BigEndian.PutUint16(f.Port[:], k.Port)
	return f
}

func (k frontendKey) key() service.Key {
	return service.Key{Addr: k.Address.Addr(), Protocol: k.Protocol, Port: binary.BigEndian.Uint16(k.Port[:])}
}

func endpointOf(a netip.AddrPort) endpoint {
	e := endpoint{Address: pin.KeyOf(a.Addr())}
	binary.BigEndian.PutUint16(e.Port[:], a.Port())
	return e
}

func (e endpoint) addrPort() netip.AddrPort {
	return netip.AddrPortFrom(e.Address.Addr(), binary.BigEndian.Uint16(e.Port[:]))
}

// Balanced is a frontend as sockets meet it.
type Balanced struct {
	service.Key                  // at 127.0.0.1 and ::1, it is met at all loopback addresses of the node itself
	Endpoints   []netip.AddrPort // none is a refusal; of UDP at a loopback address it is the node port at the node's own
	ID          uint32           // service.ID
	Affinity    time.Duration    // in whole seconds
	PodsOnly    bool             // sockets of the node's own network namespace do not meet it
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
func BalancedOf(p service.Plan) []Balanced {
	frontends := byKey(p.Frontends)
	var all []Balanced
	for _, f := range p.Frontends {
		for _, k := range keysOf(f, p.NodePortAddrs) {
			if b, found := balancedAt(frontends, p.NodePortAddrs, k); found {
				all = append(all, b)
			}
		}
	}
	slices.SortFunc(all, func(a, b Balanced) int { return a.Compare(b.Key) })
	return slices.CompactFunc(all, func(a, b Balanced) bool { return a.Key == b.Key })
}

// keysOf are the keys at which sockets may meet a frontend: a node port's are many.
func keysOf(f service.Frontend, nodePortAddrs []netip.Addr) []service.Key {
	if f.Protocol != service.TCP && f.Protocol != service.UDP {
		return nil
	}
	if !f.Addr.IsUnspecified() {
		return []service.Key{f.Key}
	}
	var keys []service.Key
	for _, a := range nodePortAddrs {
		if a.Is4() == f.Addr.Is4() {
			keys = append(keys, service.Key{Addr: a, Protocol: f.Protocol, Port: f.Port})
		}
	}
	return append(keys, service.Key{Addr: loopbackOf(f.Addr.Is4()), Protocol: f.Protocol, Port: f.Port})
}

// byKey finds frontends by their keys.
func byKey(frontends []service.Frontend) map[service.Key]service.Frontend {
	m := make(map[service.Key]service.Frontend, len(frontends))
	for _, f := range frontends {
		m[f.Key] = f
	}
	return m
}

// balancedAt is what sockets meet at a key. A frontend of just this address goes before a node port, also if it is left
// to rules for packets.
func balancedAt(frontends map[service.Key]service.Frontend, nodePorts []netip.Addr, k service.Key) (Balanced, bool) {
	f, found := frontends[k]
	if !found && (k.Addr == loopbackOf(k.Addr.Is4()) || slices.Contains(nodePorts, k.Addr)) {
		any := netip.IPv6Unspecified()
		if k.Addr.Is4() {
			any = netip.IPv4Unspecified()
		}
		f, found = frontends[service.Key{Addr: any, Protocol: k.Protocol, Port: k.Port}]
	}
	if !found || f.Sources != nil || len(f.Inside.Endpoints) == 0 && f.Inside.Drop {
		return Balanced{}, false
	}
	if k.Protocol == service.UDP && f.Addr.IsUnspecified() && k.Addr.IsLoopback() {
		// At the node's own address rules for packets serve the node port, and move connected sockets from endpoint to endpoint.
		if i := slices.IndexFunc(nodePorts, func(a netip.Addr) bool { return a.Is4() == k.Addr.Is4() }); i >= 0 {
			return Balanced{Key: k, Endpoints: []netip.AddrPort{netip.AddrPortFrom(nodePorts[i], k.Port)}, ID: service.ID(f.Service)}, true
		}
	}
	b := Balanced{Key: k, Endpoints: f.Inside.Endpoints, ID: service.ID(f.Service), Affinity: f.Affinity.Truncate(time.Second), PodsOnly: f.PodsOnly}
	if f.Affinity > 0 {
		b.Affinity = max(b.Affinity, time.Second)
	}
	if !slices.IsSortedFunc(b.Endpoints, netip.AddrPort.Compare) { // the programs search
		b.Endpoints = slices.SortedFunc(slices.Values(b.Endpoints), netip.AddrPort.Compare)
	}
	return b, true
}

// content is a set of endpoints as it is in the map: sets of the same content are one.
func content(endpoints []netip.AddrPort) string {
	b := make([]byte, 0, 20*len(endpoints))
	for _, a := range endpoints {
		b = endpointOf(a).appendTo(b)
	}
	return string(b)
}

func (e endpoint) appendTo(b []byte) []byte {
	b = append(b, e.Address[:]...)
	b = append(b, e.Port[:]...)
	return append(b, e.Unused[:]...)
}

func endpointsIn(content string) []netip.AddrPort {
	var all []netip.AddrPort
	for s := content; len(s) >= 20; s = s[20:] {
		all = append(all, endpointAt(s, 0).addrPort())
	}
	return all
}

func endpointAt(content string, i int) endpoint {
	s := content[20*i:]
	return endpoint{Address: pin.Key([]byte(s[:16])), Port: [2]byte{s[16], s[17]}}
}

func (b Balanced) value() serviceValue {
	v := serviceValue{Count: uint32(len(b.Endpoints)), ID: b.ID, Affinity: uint32(min(b.Affinity/time.Second, 1<<31))}
	if b.PodsOnly {
		v.PodsOnly = 1
	}
	return v
}
