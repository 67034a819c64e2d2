package fastpath

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// identityValue is the value of an address in the map Identities: struct identity of policies.h.
type identityValue struct {
	Number, Judged  uint16
	Ingress, Egress uint16
}

// allowedKey and blockKey are the keys of the maps Allowed and Blocks.
type allowedKey struct {
	Length, Peer uint32
	Class        uint16
	Port         [2]byte
}

type blockKey struct {
	Length, Class uint32
	Address       pin.Key
}

// elements are what the maps hold.
type elements struct {
	identities map[pin.Key]identityValue
	allowed    map[allowedKey]uint32
	blocks     map[blockKey]uint32
}

func newElements() elements {
	return elements{map[pin.Key]identityValue{}, map[allowedKey]uint32{}, map[blockKey]uint32{}}
}

// elementsOf are those of facts.
func elementsOf(f policy.Facts) elements {
	e := newElements()
	for a, is := range f.Addrs {
		e.address(a, is)
	}
	for _, c := range f.Classes {
		e.class(c)
	}
	return e
}

// Judges says whether the maps have all that is to be known of a pod of the node. A pod under policies of Admin or Baseline is not judged here, nor is one
// that is audited: the rules tell of it.
func Judges(is policy.Address) bool {
	return is.Own && is.Tiers == [2]policy.Number{} && is.Audited == [2]bool{}
}

// address adds what there is of an address.
func (e elements) address(a netip.Addr, is policy.Address) {
	v := identityValue{Number: uint16(is.Peer)}
	if Judges(is) {
		v.Judged, v.Ingress, v.Egress = 1, uint16(is.Isolated[policy.Ingress]), uint16(is.Isolated[policy.Egress])
	}
	if v != (identityValue{}) {
		e.identities[pin.KeyOf(a)] = v
	}
}

// class adds what a class of NetworkPolicies allows of TCP.
func (e elements) class(c *policy.Class) {
	if c == nil || c.Tiers {
		return
	}
	for _, a := range c.Allows {
		if r, is := portsOf(a.Grant); is {
			e.allow(c.Number, uint32(a.Peer), r)
		}
	}
	known := map[uint32][]portRange{}
	for rest := c.Blocks; len(rest) > 0; {
		n := slices.IndexFunc(rest, func(b policy.AllowBlock) bool { return b.First != rest[0].First || b.Last != rest[0].Last })
		if n < 0 {
			n = len(rest)
		}
		piece := rest[:n]
		rest = rest[n:]
		var ports []portRange
		for _, b := range piece {
			if r, is := portsOf(b.Grant); is {
				ports = append(ports, r)
			}
		}
		if len(ports) == 0 {
			continue
		}
		slices.SortFunc(ports, func(a, b portRange) int { return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to)) })
		as := blockNumber(ports)
		if was, found := known[as]; found && !slices.Equal(was, ports) {
			continue // a number that stands for something else: the stack judges these addresses
		} else if !found {
			known[as] = ports
			for _, r := range ports {
				e.allow(c.Number, as, r)
			}
		}
		for _, p := range inet.Prefixes(piece[0].First, piece[0].Last) {
			key := blockKey{Length: 32 + uint32(p.Bits()), Class: uint32(c.Number), Address: pin.KeyOf(p.Addr())}
			if p.Addr().Is4() {
				key.Length += 96
			}
			e.blocks[key] = as
		}
	}
}

func (e elements) allow(class policy.Number, peer uint32, r portRange) {
	for _, p := range r.prefixes() {
		e.allowed[allowedKey{Length: 48 + uint32(p.bits), Peer: peer, Class: uint16(class), Port: p.port}] = 1
	}
}

// blockNumber stands for the ports that are allowed with addresses. It follows from them, so that one that is in the kernel never comes to stand
// for something else. Identities are lower.
func blockNumber(ports []portRange) uint32 {
	h := fnv.New32a()
	for _, r := range ports {
		h.Write(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, r.from), r.to))
	}
	return h.Sum32() | 1<<31
}

// portRange are ports of TCP.
type portRange struct{ from, to uint16 }

// portsOf returns the ports of TCP that are granted, if any are.
func portsOf(g policy.Grant) (portRange, bool) {
	if g.All {
		return portRange{0, 1<<16 - 1}, true
	}
	return portRange{g.From, g.To}, g.Protocol == service.TCP
}

// portPrefix are the ports whose first bits are those of port.
type portPrefix struct {
	port [2]byte
	bits int
}

func (r portRange) prefixes() (list []portPrefix) {
	for from := uint32(r.from); from <= uint32(r.to); {
		size, bits := uint32(1), 16
		for bits > 0 && from%(2*size) == 0 && from+2*size-1 <= uint32(r.to) {
			size, bits = 2*size, bits-1
		}
		list = append(list, portPrefix{[2]byte(binary.BigEndian.AppendUint16(nil, uint16(from))), bits})
		from += size
	}
	return list
}
