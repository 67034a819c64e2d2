// Package ipam decides which addresses a pod gets. It is pure: what is in use, what cools down and where the
// last search ended are values that come in, and the choice is a value that goes out. Package lease keeps them.
package ipam

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Pool is a named set of ranges on this node. A pod gets one address of each family that its pool has.
type Pool struct {
	Name string `json:"name"`
	// Ranges are searched in this order, those of one family after each other.
	Ranges []netip.Prefix `json:"ranges"`
	// ExplicitOnly keeps the pool for pods that ask for it by name.
	ExplicitOnly bool `json:"explicitOnly,omitempty"`
	// Whole says that nothing in the ranges is the node's: every address is for pods.
	Whole bool `json:"whole,omitempty"`
	// Fixed are ranges of which a pod only gets an address that it asks for.
	Fixed []netip.Prefix `json:"fixed,omitempty"`
}

// Request is what a pod asks for. The zero value asks for nothing in particular.
type Request struct {
	Pool      string       // empty: the pool that has the addresses, or else the first that is not ExplicitOnly
	Addresses []netip.Addr // at most one of each family
}

// State is what is known of a node's addresses at one moment.
type State struct {
	InUse   map[netip.Addr]bool
	Cooling map[netip.Addr]bool // released, and too recently to be given out again while others are free
	// Yield are those of Cooling that are given out if nothing else is free, in this order. The caller puts first what
	// has rested longest, and leaves out what has hardly rested at all.
	Yield []netip.Addr
	// Last holds the address that was given out last, for each pool and family: the search goes on behind it, so
	// that an address rests as long as possible.
	Last map[string]netip.Addr
	// Pools are the node's blocks of address pools, beside the pools of the configuration.
	Pools []Pool
}

// Choice is what a pod gets.
type Choice struct {
	Pool      string
	Addresses []netip.Addr // IPv4 first
	// Last is what has changed in State.Last.
	Last map[string]netip.Addr
}

// Choose picks one address of each family that the pool has ranges of.
func Choose(pools []Pool, r Request, s State) (Choice, error) {
	pool, err := r.pool(slices.Concat(pools, s.Pools))
	if err != nil {
		return Choice{}, err
	}
	fixed := map[inet.Family]netip.Addr{}
	for _, a := range r.Addresses {
		f := inet.FamilyOf(a)
		if other, twice := fixed[f]; twice {
			return Choice{}, &RequestError{fmt.Sprintf("%s and %s are both %s: a pod gets one address of a family", other, a, f)}
		}
		if err := pool.permits(a, s); err != nil {
			return Choice{}, err
		}
		fixed[f] = a
	}
	c := Choice{Pool: pool.Name, Last: map[string]netip.Addr{}}
	for _, f := range inet.Families {
		if a, found := fixed[f]; found {
			c.Addresses = append(c.Addresses, a)
			continue
		}
		ranges := pool.Of(f)
		if len(ranges) == 0 {
			continue
		}
		cursor := pool.Name + " " + f.String()
		a, found := Next(ranges, s.Last[cursor], func(r netip.Prefix, a netip.Addr) bool {
			return s.InUse[a] || s.Cooling[a] || pool.reserved(r, a)
		})
		if !found {
			a, found = pool.Yields(f, s)
		}
		if !found {
			return Choice{}, &ExhaustedError{pool.Usage(f, s)}
		}
		c.Addresses = append(c.Addresses, a)
		c.Last[cursor] = a
	}
	if len(c.Addresses) == 0 {
		return Choice{}, &NoRangesError{Pool: pool.Name}
	}
	return c, nil
}

// Yields returns the address of a family that a pod gets although it cools down, because nothing else of the pool is free
// on this node, or false.
func (p Pool) Yields(f inet.Family, s State) (netip.Addr, bool) {
	for _, a := range s.Yield {
		for _, r := range p.Of(f) {
			if r.Contains(a) && !s.InUse[a] && !p.reserved(r, a) {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

// pool finds the pool that the request means.
func (r Request) pool(pools []Pool) (Pool, error) {
	var names []string
	for _, p := range pools {
		if p.Name == r.Pool && r.Pool != "" {
			return p, nil
		}
		if r.Pool == "" && len(r.Addresses) > 0 && p.holds(r.Addresses[0]).IsValid() {
			return p, nil
		}
		names = append(names, p.Name)
	}
	if r.Pool != "" {
		return Pool{}, &RequestError{fmt.Sprintf("pool %q has no ranges on this node, which has those of %q", r.Pool, names)}
	}
	if len(r.Addresses) > 0 {
		return Pool{}, &RequestError{fmt.Sprintf("%s is in no range of this node's pools %q", r.Addresses[0], names)}
	}
	for _, p := range pools {
		if !p.ExplicitOnly {
			return p, nil
		}
	}
	return Pool{}, &NoRangesError{}
}

// holds returns the range of the pool that has the address, or none.
func (p Pool) holds(a netip.Addr) netip.Prefix {
	for _, list := range [][]netip.Prefix{p.Ranges, p.Fixed} {
		for _, r := range list {
			if r.Contains(a) {
				return r
			}
		}
	}
	return netip.Prefix{}
}

func (p Pool) reserved(r netip.Prefix, a netip.Addr) bool { return !p.Whole && Reserved(r, a) }

// permits says why a pod may not have the address.
func (p Pool) permits(a netip.Addr, s State) error {
	r := p.holds(a)
	switch {
	case !r.IsValid():
		return &RequestError{fmt.Sprintf("%s is in none of the ranges %v that pool %q has on this node", a, slices.Concat(p.Ranges, p.Fixed), p.Name)}
	case p.reserved(r, a):
		return &RequestError{fmt.Sprintf("%s is not for pods: range %s keeps its first two addresses and an IPv4 one its last", a, r)}
	case s.InUse[a]:
		return &TakenError{Address: a}
	case s.Cooling[a]:
		return &TakenError{Address: a, Cooling: true}
	}
	return nil
}

// Next returns the first address behind last that is in one of the ranges and not taken. It goes through the ranges
// in order and round to where it began; a last that is in none of them starts at the first. It looks at no more
// addresses than are taken, and one: a range of IPv6 is never searched through.
func Next(ranges []netip.Prefix, last netip.Addr, taken func(netip.Prefix, netip.Addr) bool) (netip.Addr, bool) {
	if len(ranges) == 0 {
		return netip.Addr{}, false
	}
	first, from := 0, ranges[0].Masked().Addr()
	for i, r := range ranges {
		if last.IsValid() && r.Contains(last) {
			first, from = i, last.Next()
		}
	}
	// The range where the search begins comes again at the end, for the part that was left out.
	for n := range len(ranges) + 1 {
		r := ranges[(first+n)%len(ranges)].Masked()
		if n > 0 {
			from = r.Addr()
		}
		for a := from; a.IsValid() && r.Contains(a); a = a.Next() {
			if n == len(ranges) && last.IsValid() && last.Less(a) {
				break
			}
			if !taken(r, a) {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}
