package ruleset

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// servicesLayout is of the sets whose keys begin with a frontend's.
var servicesLayout = nft.Layout[service.Key, frontend]{
	Owner: func(s *nft.Set, key string) (service.Key, bool) {
		f := inet.IPv6
		if strings.HasPrefix(s.Key.Name, nftables.TypeIPAddr.Name) {
			f = inet.IPv4
		}
		k, _, ok := frontendKey(f, key)
		return k, ok
	},
	Decode: decode,
}

// SetServices makes the kernel balance Services as p says, and returns the number of elements that it changed. A table
// that is damaged is made anew. Connections that are there stay with their endpoints in any case: conntrack knows them.
// But clients with affinity that come anew after that may meet another.
func (r *Ruleset) SetServices(p service.Plan) (diff.Count, error) {
	want, err := service.ByPacketOf(p)
	if err != nil {
		return diff.Count{}, fmt.Errorf("set nftables table inet %s: %w", ServicesTable, err)
	}
	r.ownPods = &want.OwnPods
	return r.services.Set(servicesTable(want), frontendsOf(want))
}

// servicesTable is the table without frontends.
func servicesTable(p service.Plan) nft.Table {
	t := nft.Table{Name: ServicesTable, Sets: serviceSets(), Chains: serviceChains(), Elements: elements{}}
	for _, f := range inet.Families {
		t.Elements[named(ownPods, f)], t.Elements[named(nodePortAddrs, f)] = ofPrefixes(p.OwnPods, f), ofAddrs(p.NodePortAddrs, f)
	}
	return t
}

func frontendsOf(p service.Plan) iter.Seq2[service.Key, frontend] {
	return func(yield func(service.Key, frontend) bool) {
		for _, f := range p.Frontends {
			if !yield(f.Key, frontend{f, &p.OwnPods}) {
				return
			}
		}
	}
}

// ChangeServices does what SetServices would, for a few Services and in a fraction of a millisecond, in one
// transaction: it reads nothing. If it fails, what the kernel holds is not what it was thought to, and SetServices is to
// be called.
//
// Where it makes a chain, for the first frontend with so many endpoints or for a Service with affinity, the kernel goes
// through the whole map of endpoints that the chain is to use: some milliseconds if they are a hundred thousand.
func (r *Ruleset) ChangeServices(changes []service.Change) error {
	// First what all of them no longer have, then what they have now: an address may go from one to another.
	now := map[service.Key]nft.Change[service.Key, frontend]{}
	for _, c := range changes {
		for _, f := range c.Old {
			held, err := service.ByPacket(f)
			if err != nil {
				return fmt.Errorf("change nftables table inet %s: %w", ServicesTable, err)
			}
			now[f.Key] = nft.Change[service.Key, frontend]{Key: f.Key, Old: &frontend{held, r.ownPods}}
		}
	}
	for _, c := range changes {
		for _, f := range c.New {
			held, err := service.ByPacket(f)
			if err == nil && now[f.Key].New != nil {
				err = fmt.Errorf("%s of Service %s is another's already", f.Key, c.Service)
			}
			if err != nil {
				return fmt.Errorf("change nftables table inet %s: %w", ServicesTable, err)
			}
			now[f.Key] = nft.Change[service.Key, frontend]{Key: f.Key, Old: now[f.Key].Old, New: &frontend{held, r.ownPods}}
		}
	}
	return r.services.Change(slices.Collect(maps.Values(now)))
}

// Services reads back what SetServices set, as service.ByPacketOf says it. A table that is not there, or that does something else, is
// as good as one that holds nothing.
func (r *Ruleset) Services() (service.Plan, error) {
	rest, frontends, _, err := r.services.Read(servicesTable(service.Plan{}))
	p := service.Plan{NodePortAddrs: elements(rest).addrs(nodePortAddrs), OwnPods: elements(rest).prefixes(ownPods)}
	for _, f := range frontends {
		p.Frontends = append(p.Frontends, f.Frontend)
	}
	slices.SortFunc(p.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	return p, err
}

// HoldsServices says whether the kernel holds what SetServices and ChangeServices left there. It may be called beside them.
func (r *Ruleset) HoldsServices(ctx context.Context) (bool, error) { return r.services.Holds(ctx) }

// AffinityFull returns the IDs (service.ID) of Services a client of which found no room to be remembered in the last minute.
func (r *Ruleset) AffinityFull() ([]uint32, error) {
	var all []uint32
	for _, s := range serviceSets() {
		if s.Name != named(affinityFull, inet.IPv4) && s.Name != named(affinityFull, inet.IPv6) {
			continue
		}
		list, err := r.services.ReadSet(ServicesTable, s)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			if len(e.Key) == 4 {
				all = append(all, binary.NativeEndian.Uint32([]byte(e.Key)))
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// DeleteServices takes the table away. One that is not there is not an error. Connections to Services then last only if
// another table has chains for NAT at the same hooks, for without any the kernel translates nothing.
func (r *Ruleset) DeleteServices() error { return r.services.Delete(ServicesTable) }
