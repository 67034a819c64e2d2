package connect

import (
	"encoding/binary"
	"net/netip"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Keys and values of the maps in connect.c.
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

// Indexes of the map pin.Node.
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

// content encodes a set of endpoints as the map holds it. Frontends with the same content share one set.
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

func valueOf(b service.Balanced) serviceValue {
	v := serviceValue{Count: uint32(len(b.Endpoints)), ID: b.ID, Affinity: uint32(min(b.Affinity/time.Second, 1<<31))}
	if b.PodsOnly {
		v.PodsOnly = 1
	}
	return v
}
