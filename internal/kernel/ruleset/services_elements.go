package ruleset

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// element is one of a set or map, with bytes as the kernel has them.
type element struct {
	key     string
	keyEnd  string // the last key of an interval of concatenated keys
	end     bool   // key is the first that an interval of single keys has no more
	value   string // of a map; the chain of a verdict that goes there
	verdict bool
	code    expr.VerdictKind
	comment string
}

// asHeld returns a frontend as the kernel holds it, which is what it does and not how it is said.
func asHeld(f service.Frontend) (service.Frontend, error) {
	broken := func(format string, args ...any) error {
		return fmt.Errorf("%s of Service %s: %s", f.Key, f.Service, fmt.Sprintf(format, args...))
	}
	for _, b := range []*service.Backends{&f.Inside, &f.Outside} {
		if len(b.Endpoints) > maxEndpoints {
			return f, broken("it has %d endpoints, and at most %d are possible", len(b.Endpoints), maxEndpoints)
		}
		for _, e := range b.Endpoints {
			if e.Addr().Is4() != f.Addr.Is4() || e.Addr().Zone() != "" {
				return f, broken("the endpoint %s is of another family", e)
			}
		}
		if len(b.Endpoints) == 0 {
			b.Endpoints = nil
		} else {
			b.Drop = false
		}
	}
	f.Affinity = min(f.Affinity.Truncate(time.Second), maxAffinity*time.Second)
	if f.Inside.Endpoints == nil && f.Outside.Endpoints == nil {
		f.Affinity = 0
	}
	if f.Sources == nil {
		return f, nil
	}
	if f.Addr.IsUnspecified() {
		return f, broken("a NodePort cannot be for certain sources alone")
	}
	for _, p := range f.Sources {
		if p.Addr().Is4() != f.Addr.Is4() {
			return f, broken("the source %s is of another family", p)
		}
	}
	f.Sources = outermost(f.Sources)
	return f, nil
}

// outermost returns the prefixes, sorted, without those that others contain.
func outermost(list []netip.Prefix) []netip.Prefix {
	all := make([]netip.Prefix, 0, len(list))
	for _, p := range list {
		all = append(all, p.Masked())
	}
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	kept := all[:0]
	for _, p := range all {
		if len(kept) == 0 || !kept[len(kept)-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}

// keyOf returns a frontend's key as in the kernel; portBytes returns a port so, with what follows it.
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

// number returns a number as in the kernel's marks.
func number(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

// endpointID returns the number that stands for an endpoint where affinity is kept. That of an address is for all ports of a
// Service, so that clients keep to it; where an address has several endpoints, that of address and port is for each of
// them. Two with one ID cost affinity, not correctness. It is not 0, which says that a client is remembered.
func endpointID(of []byte) string {
	h := fnv.New32a()
	h.Write(of)
	return number(max(h.Sum32(), 1))
}

// side is what a frontend is to some clients: the chain that its packets go to, if it has endpoints.
type side struct {
	target
	backends service.Backends
}

// sides are one, or two if it matters where a client is.
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
	// IPv6 clients outside are remembered by their networks.
	if f.Split() || f.Affinity > 0 && w.family == inet.IPv6 {
		w.outside = true
		all = append(all, of(w, f.Outside))
	}
	return all
}

// eachElement hands over all that the sets hold of a frontend, which is as asHeld makes it.
func eachElement(f service.Frontend, yield func(set string, e element)) {
	key := keyOf(f.Key)
	family := inet.FamilyOf(f.Addr)
	comment := f.Service.String()
	if f.PortName != "" {
		comment += ":" + f.PortName
	}
	comment += " " + f.Kind.String()
	for _, s := range sides(f) {
		if s.count == 0 {
			refusal := element{key: key, verdict: true, code: expr.VerdictDrop, comment: comment}
			if !s.backends.Drop {
				refusal.code, refusal.value = expr.VerdictGoto, refuseChain
			}
			yield(s.in(refused, refusedOutside), refusal)
			continue
		}
		if s.outside && len(f.Inside.Endpoints) == 0 { // or it would be refused as if from inside
			yield(s.in(refused, refusedOutside), element{key: key, verdict: true, code: expr.VerdictAccept, comment: comment})
		}
		yield(s.in(services, servicesOutside), element{key: key, value: number(uint32(s.count)), comment: comment})
		if f.Affinity > 0 {
			yield(s.in(sticky, stickyOutside), element{key: key, verdict: true, code: expr.VerdictGoto, value: s.name()})
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
			yield(named(endpoints, family), element{key: slot, value: endpointBytes(e)})
			if f.Affinity == 0 {
				continue
			}
			addr, own := endpointID(e.Addr().AsSlice()), endpointID([]byte(endpointBytes(e)))
			id := addr
			if at[e.Addr()] > 1 {
				id = own
			}
			yield(named(affinitySlots, family), element{key: slot, value: id})
			// Both, whichever new clients get: the address may have had another endpoint, or get one. Who comes by the address
			// alone gets its first.
			for _, id := range []string{addr, own} {
				if !met[id] {
					met[id] = true
					yield(s.in(affinityEndpoints, affinityOutside), element{key: key + id, value: endpointBytes(e)})
				}
			}
		}
	}
	if f.PodsOnly {
		yield(named(podsOnly, family), element{key: key})
	}
	if f.Sources != nil {
		yield(named(restricted, family), element{key: key})
		for _, p := range f.Sources {
			yield(named(sources, family), element{key: key + string(p.Addr().AsSlice()), keyEnd: key + string(inet.Last(p).AsSlice())})
		}
	}
}

// parseComment is the reverse of eachElement's.
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

// frontendKey is the reverse of keyOf, of the beginning of a key; rest is what follows.
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

// decode makes a plan of what the sets hold, by the sets' names. It takes only what is needed for that: whether the rest
// fits is seen by making elements of the plan.
func decode(sets map[string][]element) (service.Plan, bool) {
	var p service.Plan
	complete := true
	for _, family := range inet.Families {
		frontends := map[service.Key]*service.Frontend{}
		slots := make(map[string]string, len(sets[named(endpoints, family)])) // endpoints, by frontend and slot
		of := func(set string, f func(k service.Key, rest string, e element) bool) {
			for _, e := range sets[named(set, family)] {
				k, rest, ok := frontendKey(family, e.key)
				complete = ok && f(k, rest, e) && complete
			}
		}
		for _, e := range sets[named(endpoints, family)] {
			slots[e.key] = e.value
		}
		backends := func(k service.Key, first uint32, value string) (b service.Backends, ok bool) {
			if len(value) != 4 {
				return b, false
			}
			key := keyOf(k)
			count := binary.NativeEndian.Uint32([]byte(value))
			b.Endpoints = make([]netip.AddrPort, 0, min(count, maxEndpoints))
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
		affine := func(k service.Key, _ string, e element) bool {
			f := frontends[k]
			seconds, ok := secondsOf(e.value)
			if f != nil {
				f.Affinity = time.Duration(seconds) * time.Second
			}
			return ok && f != nil
		}
		of(services, func(k service.Key, _ string, e element) bool {
			b, ok := backends(k, 0, e.value)
			return inside(b, k, e.comment) && ok
		})
		of(refused, func(k service.Key, _ string, e element) bool {
			return inside(service.Backends{Drop: e.code == expr.VerdictDrop}, k, e.comment)
		})
		of(servicesOutside, func(k service.Key, _ string, e element) bool {
			b, ok := backends(k, outsideSlots, e.value)
			return outside(b, k) && ok
		})
		of(refusedOutside, func(k service.Key, _ string, e element) bool {
			return e.code == expr.VerdictAccept || outside(service.Backends{Drop: e.code == expr.VerdictDrop}, k)
		})
		of(sticky, affine)
		of(stickyOutside, affine)
		of(podsOnly, func(k service.Key, _ string, _ element) bool {
			f := frontends[k]
			if f != nil {
				f.PodsOnly = true
			}
			return f != nil
		})
		of(restricted, func(k service.Key, _ string, _ element) bool {
			f := frontends[k]
			if f != nil {
				f.Sources = []netip.Prefix{}
			}
			return f != nil
		})
		of(sources, func(k service.Key, rest string, e element) bool {
			f := frontends[k]
			if f == nil || len(e.keyEnd) != len(e.key) || !strings.HasPrefix(e.keyEnd, e.key[:len(e.key)-len(rest)]) {
				return false
			}
			from, _ := netip.AddrFromSlice([]byte(rest))
			to, ok := netip.AddrFromSlice([]byte(e.keyEnd[len(e.keyEnd)-len(rest):]))
			if !ok {
				return false
			}
			f.Sources = append(f.Sources, netip.PrefixFrom(from, sameBits(from, to)))
			return true
		})
		for _, f := range frontends {
			slices.SortFunc(f.Sources, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
			p.Frontends = append(p.Frontends, *f)
		}
		for _, e := range sets[named(nodePortAddrs, family)] {
			a, ok := netip.AddrFromSlice([]byte(e.key))
			p.NodePortAddrs = append(p.NodePortAddrs, a)
			complete = complete && ok
		}
		found := make([]nftables.SetElement, 0, len(sets[named(ownPods, family)]))
		for _, e := range sets[named(ownPods, family)] {
			found = append(found, nftables.SetElement{Key: []byte(e.key), IntervalEnd: e.end})
		}
		all, ok := set{interval: true}.singles(found)
		p.OwnPods = prefixes(p.OwnPods, all)
		complete = complete && ok
	}
	slices.SortFunc(p.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	slices.SortFunc(p.NodePortAddrs, netip.Addr.Compare)
	return p, complete
}

// prefixElements are those of a set of prefixes of one family.
func prefixElements(family inet.Family, list []netip.Prefix) []element {
	var all []element
	for _, p := range list {
		if inet.FamilyOf(p.Addr()) != family {
			continue
		}
		all = append(all, element{key: string(p.Addr().AsSlice())})
		if end := inet.Last(p).Next(); end.IsValid() { // what reaches to the last address of all has no end
			all = append(all, element{key: string(end.AsSlice()), end: true})
		}
	}
	return all
}

// addrElements are those of a set of addresses.
func addrElements(family inet.Family, list []netip.Addr) []element {
	var all []element
	for _, a := range list {
		if inet.FamilyOf(a) == family {
			all = append(all, element{key: string(a.AsSlice())})
		}
	}
	return all
}

// meetElement says that who is at an address may meet himself there.
func meetElement(a netip.Addr) element {
	return element{key: string(a.AsSlice()) + string(a.AsSlice())}
}
