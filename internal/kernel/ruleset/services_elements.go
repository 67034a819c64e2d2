package ruleset

import (
	"encoding/binary"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// frontend is a part of the table of Services: a frontend in the form of service.ByPacket.
type frontend struct {
	service.Frontend
	own *[]netip.Prefix // the node's own pods
}

// Equal says whether both behave the same and have the same own endpoints.
func (f frontend) Equal(other frontend) bool {
	return f.Frontend.Equal(other.Frontend) && (slices.Equal(*f.own, *other.own) || slices.Equal(f.ownEndpoints(), other.ownEndpoints()))
}

// Shares yields what frontends share: the chains of the frontend's sides, and its own endpoints.
func (f frontend) Shares(yield func(nft.Shared)) {
	for _, s := range sides(f.Frontend) {
		if s.count > 0 {
			yield(s.target)
		}
	}
	for _, a := range f.ownEndpoints() {
		yield(ownEndpoint{a})
	}
}

// ownEndpoints returns the addresses of endpoints that are the node's own pods, with duplicates.
func (f frontend) ownEndpoints() (list []netip.Addr) {
	for _, b := range []service.Backends{f.Inside, f.Outside} {
		for _, e := range b.Endpoints {
			if inet.Contains(*f.own, e.Addr()) {
				list = append(list, e.Addr())
			}
		}
	}
	return list
}

// ownEndpoint is the address of a pod of this node that may reach itself through a Service (hairpin).
type ownEndpoint struct{ netip.Addr }

func (a ownEndpoint) Chain() *nft.Chain { return nil }

// Elements yields the pair of the address with itself.
func (a ownEndpoint) Elements(yield func(set string, e nft.Element)) {
	yield(named(ownEndpoints, inet.FamilyOf(a.Addr)), nft.Element{Key: string(a.AsSlice()) + string(a.AsSlice())})
}

// keyOf returns a frontend's key as the kernel has it. portBytes returns a port with its padding.
func keyOf(k service.Key) string {
	b := append(k.Addr.AsSlice(), byte(k.Protocol), 0, 0, 0)
	return string(append(b, portBytes(k.Port)...))
}

func portBytes(port uint16) []byte {
	return append(binary.BigEndian.AppendUint16(nil, port), 0, 0)
}

func endpointBytes(e netip.AddrPort) string {
	return string(append(e.Addr().AsSlice(), portBytes(e.Port())...))
}

// number returns a number in the encoding of nftables' type mark.
func number(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

// endpointID returns the number by which the map affinity refers to an endpoint. The ID of an address holds for all ports of a
// Service, so that a client keeps its endpoint at all of them. If an address has several endpoints, each has the ID of its
// address and port. A collision of two IDs costs affinity, not correctness. An ID is never 0, which means that the client has
// been stored.
func endpointID(of []byte) string {
	h := fnv.New32a()
	h.Write(of)
	return number(max(h.Sum32(), 1))
}

// side is a frontend as clients inside or outside the cluster see it: its endpoints, and the chain that balances them.
type side struct {
	target
	backends service.Backends
}

// sides returns one side, or two if clients inside and outside the cluster differ.
func sides(f service.Frontend) []side {
	w := way{family: inet.FamilyOf(f.Addr), nodePort: f.Addr.IsUnspecified()}
	of := func(w way, b service.Backends) side {
		s := side{target{way: w, count: len(b.Endpoints)}, b}
		if f.Affinity > 0 {
			s.seconds, s.id = int(f.Affinity/time.Second), service.ID(f.Service)
		}
		return s
	}
	all := []side{of(w, f.Inside)}
	// The map affinity holds IPv6 clients outside the cluster by their /64, so they need a chain of their own.
	if f.Split() || f.Affinity > 0 && w.family == inet.IPv6 {
		w.outside = true
		all = append(all, of(w, f.Outside))
	}
	return all
}

// Elements yields the elements that belong to this frontend alone.
func (f frontend) Elements(yield func(set string, e nft.Element)) {
	key := keyOf(f.Key)
	family := inet.FamilyOf(f.Addr)
	comment := f.Service.String()
	if f.PortName != "" {
		comment += ":" + f.PortName
	}
	comment += " " + f.Kind.String()
	for _, s := range sides(f.Frontend) {
		if s.count == 0 {
			refusal := nft.Element{Key: key, Verdict: true, Code: expr.VerdictDrop, Comment: comment}
			if !s.backends.Drop {
				refusal.Code, refusal.Value = expr.VerdictGoto, refuseChain
			}
			yield(s.in(refused, refusedOutside), refusal)
			continue
		}
		if s.outside && len(f.Inside.Endpoints) == 0 { // otherwise the rule for clients inside rejects the packet
			yield(s.in(refused, refusedOutside), nft.Element{Key: key, Verdict: true, Code: expr.VerdictAccept, Comment: comment})
		}
		yield(s.in(services, servicesOutside), nft.Element{Key: key, Value: number(uint32(s.count)), Comment: comment})
		if f.Affinity > 0 {
			yield(s.in(sticky, stickyOutside), nft.Element{Key: key, Verdict: true, Code: expr.VerdictGoto, Value: s.name()})
		}
		first := uint32(0)
		if s.outside {
			first = outsideSlots
		}
		met, at := map[string]bool{}, map[netip.Addr]int{}
		if f.Affinity > 0 {
			for _, e := range s.backends.Endpoints {
				at[e.Addr()]++
			}
		}
		for i, e := range s.backends.Endpoints {
			slot := key + number(first+uint32(i))
			yield(named(endpoints, family), nft.Element{Key: slot, Value: endpointBytes(e)})
			if f.Affinity == 0 {
				continue
			}
			addr, own := endpointID(e.Addr().AsSlice()), endpointID([]byte(endpointBytes(e)))
			id := addr
			if at[e.Addr()] > 1 {
				id = own
			}
			yield(named(affinitySlots, family), nft.Element{Key: slot, Value: id})
			// Both IDs are written, whichever new clients get: the address may have had a second endpoint, or may get one. The ID
			// of the address alone leads to its first endpoint.
			for _, id := range []string{addr, own} {
				if !met[id] {
					met[id] = true
					yield(s.in(affinityEndpoints, affinityOutside), nft.Element{Key: key + id, Value: endpointBytes(e)})
				}
			}
		}
	}
	if f.PodsOnly {
		yield(named(podsOnly, family), nft.Element{Key: key})
	}
	if f.Sources != nil {
		yield(named(restricted, family), nft.Element{Key: key})
		for _, p := range f.Sources {
			yield(named(sources, family), nft.Element{Key: key + string(p.Addr().AsSlice()), KeyEnd: key + string(inet.Last(p).AsSlice())})
		}
	}
}

// parseComment parses the comment that Elements writes.
func parseComment(comment string, f *service.Frontend) bool {
	object, kind, _ := strings.Cut(comment, " ")
	object, f.PortName, _ = strings.Cut(object, ":")
	var found bool
	f.Service.Namespace, f.Service.Name, found = strings.Cut(object, "/")
	for f.Kind = service.ClusterIP; f.Kind <= service.NodePort; f.Kind++ {
		if f.Kind.String() == kind {
			return found
		}
	}
	return false
}

// frontendKey parses the key of a frontend at the beginning of key. rest is the remainder.
func frontendKey(f inet.Family, key string) (k service.Key, rest string, ok bool) {
	n := words(f) * 4
	if len(key) < n+8 {
		return k, "", false
	}
	k.Addr, _ = netip.AddrFromSlice([]byte(key[:n]))
	k.Protocol, k.Port = service.Protocol(key[n]), uint16(key[n+4])<<8|uint16(key[n+5])
	return k, key[n+8:], true
}

func endpointOf(b string) (netip.AddrPort, bool) {
	if len(b) < 4 {
		return netip.AddrPort{}, false
	}
	a, ok := netip.AddrFromSlice([]byte(b[:len(b)-4]))
	return netip.AddrPortFrom(a, uint16(b[len(b)-4])<<8|uint16(b[len(b)-3])), ok
}

// decode turns the elements of the sets, by set name, into frontends.
func decode(sets map[string][]nft.Element) (rest map[string][]nft.Element, parts map[service.Key]frontend, complete bool) {
	rest, parts, complete = elements{}, map[service.Key]frontend{}, true
	own := elements(sets).prefixes(ownPods)
	for _, family := range inet.Families {
		frontends := map[service.Key]*service.Frontend{}
		slots := make(map[string]string, len(sets[named(endpoints, family)])) // endpoints, by frontend and slot
		of := func(set string, f func(k service.Key, rest string, e nft.Element) bool) {
			for _, e := range sets[named(set, family)] {
				k, rest, ok := frontendKey(family, e.Key)
				complete = ok && f(k, rest, e) && complete
			}
		}
		for _, e := range sets[named(endpoints, family)] {
			slots[e.Key] = e.Value
		}
		backends := func(k service.Key, first uint32, value string) (b service.Backends, ok bool) {
			if len(value) != 4 {
				return b, false
			}
			key := keyOf(k)
			count := binary.NativeEndian.Uint32([]byte(value))
			b.Endpoints = make([]netip.AddrPort, 0, min(count, service.MaxEndpoints))
			for i := range count {
				e, ok := endpointOf(slots[key+number(first+i)])
				if !ok {
					return b, false
				}
				b.Endpoints = append(b.Endpoints, e)
			}
			return b, count > 0
		}
		inside := func(b service.Backends, k service.Key, comment string) bool {
			frontends[k] = &service.Frontend{Key: k, Inside: b, Outside: b}
			return parseComment(comment, frontends[k])
		}
		outside := func(b service.Backends, k service.Key) bool {
			f := frontends[k]
			if f != nil {
				f.Outside = b
			}
			return f != nil
		}
		affine := func(k service.Key, _ string, e nft.Element) bool {
			f := frontends[k]
			seconds, ok := secondsOf(e.Value)
			if f != nil {
				f.Affinity = time.Duration(seconds) * time.Second
			}
			return ok && f != nil
		}
		of(services, func(k service.Key, _ string, e nft.Element) bool {
			b, ok := backends(k, 0, e.Value)
			return inside(b, k, e.Comment) && ok
		})
		of(refused, func(k service.Key, _ string, e nft.Element) bool {
			return inside(service.Backends{Drop: e.Code == expr.VerdictDrop}, k, e.Comment)
		})
		of(servicesOutside, func(k service.Key, _ string, e nft.Element) bool {
			b, ok := backends(k, outsideSlots, e.Value)
			return outside(b, k) && ok
		})
		of(refusedOutside, func(k service.Key, _ string, e nft.Element) bool {
			return e.Code == expr.VerdictAccept || outside(service.Backends{Drop: e.Code == expr.VerdictDrop}, k)
		})
		of(sticky, affine)
		of(stickyOutside, affine)
		of(podsOnly, func(k service.Key, _ string, _ nft.Element) bool {
			f := frontends[k]
			if f != nil {
				f.PodsOnly = true
			}
			return f != nil
		})
		of(restricted, func(k service.Key, _ string, _ nft.Element) bool {
			f := frontends[k]
			if f != nil {
				f.Sources = []netip.Prefix{}
			}
			return f != nil
		})
		of(sources, func(k service.Key, rest string, e nft.Element) bool {
			f := frontends[k]
			if f == nil || len(e.KeyEnd) != len(e.Key) || !strings.HasPrefix(e.KeyEnd, e.Key[:len(e.Key)-len(rest)]) {
				return false
			}
			p, ok := nft.Element{Key: rest, KeyEnd: e.KeyEnd[len(e.KeyEnd)-len(rest):]}.Prefix()
			if !ok {
				return false
			}
			f.Sources = append(f.Sources, p)
			return true
		})
		for _, f := range frontends {
			slices.SortFunc(f.Sources, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
			parts[f.Key] = frontend{*f, &own}
		}
		for _, set := range []string{nodePortAddrs, ownPods} {
			rest[named(set, family)] = sets[named(set, family)]
			complete = complete && allPrefixes(sets[named(set, family)])
		}
	}
	return rest, parts, complete
}
