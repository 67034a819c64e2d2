package service

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Limits of the rules for packets.
const (
	MaxEndpoints = 1<<16 - 1      // of a frontend: numbers of 16 bits
	MaxAffinity  = 24 * time.Hour // the API's own limit
)

// ByPacketOf returns a plan in the form in which rules for packets hold it: sorted, and without what has no effect there.
func ByPacketOf(p Plan) (Plan, error) {
	held := Plan{Frontends: make([]Frontend, 0, len(p.Frontends)), NodePortAddrs: slices.Clone(p.NodePortAddrs),
		OwnPods: inet.Disjoint(p.OwnPods)}
	for _, f := range p.Frontends {
		f, err := ByPacket(f)
		if err != nil {
			return held, err
		}
		held.Frontends = append(held.Frontends, f)
	}
	slices.SortFunc(held.Frontends, func(a, b Frontend) int { return a.Compare(b.Key) })
	for i := range held.Frontends[min(1, len(held.Frontends)):] {
		if f := held.Frontends[i+1]; f.Key == held.Frontends[i].Key {
			return held, fmt.Errorf("%s is both of Service %s and of %s", f.Key, held.Frontends[i].Service, f.Service)
		}
	}
	slices.SortFunc(held.NodePortAddrs, netip.Addr.Compare)
	held.NodePortAddrs = slices.Compact(held.NodePortAddrs)
	return held, nil
}

// ByPacket returns a frontend in the form in which rules for packets hold it. Two frontends with the same effect have the same
// form.
func ByPacket(f Frontend) (Frontend, error) {
	broken := func(format string, args ...any) error {
		return fmt.Errorf("%s of Service %s: %s", f.Key, f.Service, fmt.Sprintf(format, args...))
	}
	for _, b := range []*Backends{&f.Inside, &f.Outside} {
		if len(b.Endpoints) > MaxEndpoints {
			return f, broken("it has %d endpoints, and at most %d are possible", len(b.Endpoints), MaxEndpoints)
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
	f.Affinity = min(f.Affinity.Truncate(time.Second), MaxAffinity)
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
	f.Sources = inet.Disjoint(f.Sources)
	return f, nil
}

// UnservedAsHeld returns u in the form in which the kernel holds it: the ranges include the addresses of load balancers, no range
// contains another, all lists are sorted, and the node has at most one address of each family.
func UnservedAsHeld(u Unserved) Unserved {
	ranges := slices.Clone(u.Ranges)
	for _, a := range u.LoadBalancers {
		ranges = append(ranges, netip.PrefixFrom(a, a.BitLen()))
	}
	sorted := func(all []netip.Addr) []netip.Addr {
		return slices.Compact(slices.SortedFunc(slices.Values(all), netip.Addr.Compare))
	}
	held := Unserved{Ranges: inet.Disjoint(ranges), LoadBalancers: sorted(u.LoadBalancers), Others: sorted(u.Others)}
	for _, f := range inet.Families {
		if i := slices.IndexFunc(u.Node, func(a netip.Addr) bool { return inet.FamilyOf(a) == f }); i >= 0 {
			held.Node = append(held.Node, u.Node[i])
		}
	}
	return held
}
