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

// servicesLayout describes the sets whose keys begin with the key of a frontend.
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

// SetServices makes the kernel balance Services as p says, and returns the number of elements that it changed. It replaces
// a damaged table. Established connections keep their endpoints in any case, since conntrack holds them. After a
// replacement, a client with affinity may get another endpoint for its next connection.
func (r *Ruleset) SetServices(p service.Plan) (diff.Count, error) {
	want, err := service.ByPacketOf(p)
	if err != nil {
		return diff.Count{}, fmt.Errorf("set nftables table inet %s: %w", ServicesTable, err)
	}
	r.ownPods = &want.OwnPods
	return r.services.Set(servicesTable(want), frontendsOf(want))
}

// servicesTable returns the table without frontends.
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

// ChangeServices applies changes of a few Services in one transaction. It reads nothing from the kernel, and so takes a
// fraction of a millisecond. If it fails, the kernel does not hold what r expects, and the caller must call SetServices.
//
// The first frontend with a given number of endpoints needs a new chain, and so does a Service with affinity. When a chain is
// added, the kernel walks the whole map of endpoints that the chain uses: some milliseconds for a hundred thousand endpoints.
func (r *Ruleset) ChangeServices(changes []service.Change) error {
	// Old frontends come before new ones, since an address may move from one Service to another.
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

// Services reads back what SetServices set, in the form of service.ByPacketOf. A table that is missing, or whose rules are not
// ours, counts as empty.
func (r *Ruleset) Services() (service.Plan, error) {
	rest, frontends, _, err := r.services.Read(servicesTable(service.Plan{}))
	p := service.Plan{NodePortAddrs: elements(rest).addrs(nodePortAddrs), OwnPods: elements(rest).prefixes(ownPods)}
	for _, f := range frontends {
		p.Frontends = append(p.Frontends, f.Frontend)
	}
	slices.SortFunc(p.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	return p, err
}

// HoldsServices says whether the kernel still holds what SetServices and ChangeServices wrote. It may run concurrently with them.
func (r *Ruleset) HoldsServices(ctx context.Context) (bool, error) { return r.services.Holds(ctx) }

// AffinityFull returns the IDs (service.ID) of Services for which, in the last minute, the map of clients was full when a new
// client came.
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

// DeleteServices deletes the table. A table that does not exist is not an error. Connections to Services then survive only if
// another table has NAT chains at the same hooks: without any, the kernel stops translating packets.
func (r *Ruleset) DeleteServices() error { return r.services.Delete(ServicesTable) }
