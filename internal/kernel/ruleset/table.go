package ruleset

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
)

// table is what a table of ours should hold.
type table struct {
	name string
	// variant tells tables of one name with other rules apart.
	variant string
	sets    []set
	chains  []chain
}

// set is a named set of addresses, or of pairs of them.
type set struct {
	name, comment string
	family        inet.Family
	interval      bool // of prefixes, not of single addresses
	// pairedWith, if set, is the family of the address that comes first in each element, `address . prefix`. All prefixes
	// of such a set have this many bits, and the rules look up the rest of an address as zeros: the kernel has a hash
	// table for that. Prefixes of any length behind an address would be its slowest kind of set.
	pairedWith inet.Family
	bits       int
}

type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []rule
}

type rule struct {
	comment string
	exprs   []expr.Any
}

// member is an element of a set. A single address is a prefix of full length.
type member struct {
	first  netip.Addr // of a pair
	prefix netip.Prefix
}

func (m member) key() member { return m }

// elements are the members of a table's sets, by the sets' names, sorted.
type elements map[string][]member

// alone returns members that are no pairs: the prefixes of one family, sorted.
func alone(list []netip.Prefix, f inet.Family) []member {
	members := make([]member, 0, len(list))
	for _, p := range list {
		if inet.FamilyOf(p.Addr()) == f {
			members = append(members, member{prefix: p})
		}
	}
	slices.SortFunc(members, func(a, b member) int { return a.prefix.Addr().Compare(b.prefix.Addr()) })
	return members
}

// single is alone of addresses.
func single(list []netip.Addr, f inet.Family) []member {
	prefixes := make([]netip.Prefix, 0, len(list))
	for _, a := range list {
		prefixes = append(prefixes, netip.PrefixFrom(a, a.BitLen()))
	}
	return alone(prefixes, f)
}

// prefixes adds those of members to a list.
func prefixes(list []netip.Prefix, members []member) []netip.Prefix {
	for _, m := range members {
		list = append(list, m.prefix)
	}
	return list
}

// addrs is prefixes of single addresses.
func addrs(list []netip.Addr, members []member) []netip.Addr {
	for _, m := range members {
		list = append(list, m.prefix.Addr())
	}
	return list
}

// errStrange says that a table is not as we make them: it is made anew.
var errStrange = errors.New("the table is not as it should be")

// set makes the kernel hold the table with these elements, in one transaction, and returns what it changed.
func (r *Ruleset) set(t table, want elements) (diff.Count, error) {
	count, err := r.try(t, want)
	if err != nil {
		return diff.Count{}, fmt.Errorf("set nftables table inet %s: %w", t.name, err)
	}
	return count, nil
}

func (r *Ruleset) try(t table, want elements) (diff.Count, error) {
	have, before, err := r.read(t)
	if errors.Is(err, errStrange) {
		return diff.Count{Added: 1}, r.replace(t, want)
	}
	if err != nil {
		return diff.Count{}, err
	}
	var count diff.Count
	inKernel := r.table(t)
	for _, s := range t.sets {
		d := diff.Compare(want[s.name], have[s.name], member.key)
		count.Added, count.Removed = count.Added+len(d.Add), count.Removed+len(d.Remove)
		// All of it becomes true at once, so that what goes may go first: it may overlap what comes.
		in := inKernel.set(s)
		if err := r.elements(d.Remove, s, in, r.conn.SetDeleteElements); err != nil {
			return diff.Count{}, err
		}
		if err := r.elements(d.Add, s, in, r.conn.SetAddElements); err != nil {
			return diff.Count{}, err
		}
	}
	if count == (diff.Count{}) {
		r.known[t.name] = known{t.variant, before, want}
		return count, nil
	}
	if err := r.conn.Flush(); err != nil {
		// Elements that somebody else added or took away meanwhile, or ones that only look like ours.
		return diff.Count{Added: 1}, r.replace(t, want)
	}
	r.learn(t, before, want)
	return count, nil
}

// learn keeps in mind what the table holds if ours was the only transaction since a generation.
func (r *Ruleset) learn(t table, before uint32, holds elements) {
	delete(r.known, t.name)
	if after, err := r.socket.generation(); err == nil && after == before+1 {
		r.known[t.name] = known{t.variant, after, holds}
	}
}

// replace makes the table anew, in one transaction: packets meet the old one or the new one.
func (r *Ruleset) replace(t table, want elements) error {
	before, err := r.socket.generation()
	if err != nil {
		return err
	}
	in := r.table(t)
	r.conn.AddTable(in.Table) // so that the deletion after it does not fail
	r.conn.DelTable(in.Table)
	r.conn.AddTable(in.Table)
	for _, s := range t.sets {
		kernel := in.set(s)
		if err := r.conn.AddSet(kernel, nil); err != nil {
			return err
		}
		if err := r.elements(want[s.name], s, kernel, r.conn.SetAddElements); err != nil {
			return err
		}
	}
	chains := make([]*nftables.Chain, len(t.chains))
	for i, c := range t.chains { // all of them first: rules may jump to any
		chains[i] = r.conn.AddChain(&nftables.Chain{Name: c.name, Table: in.Table, Type: c.kind, Hooknum: c.hook, Priority: c.priority})
	}
	for i, c := range t.chains {
		for _, x := range c.rules {
			r.conn.AddRule(&nftables.Rule{Table: in.Table, Chain: chains[i], Exprs: x.exprs,
				UserData: userdata.AppendString(nil, userdata.TypeComment, x.comment)})
		}
	}
	if err := r.conn.Flush(); err != nil {
		return err
	}
	r.learn(t, before, want)
	return nil
}

// read returns what the sets of the table hold, and at which generation. The error is errStrange if anything but
// the elements differs from what should be.
func (r *Ruleset) read(t table) (elements, uint32, error) {
	const enough = 20
	for range enough {
		before, err := r.socket.generation()
		if err != nil {
			return nil, 0, err
		}
		if k, ok := r.known[t.name]; ok && k.variant == t.variant && k.generation == before {
			return k.elements, before, nil // no transaction since, so it cannot have changed
		}
		have, err := r.readOnce(t)
		after, genErr := r.socket.generation()
		switch {
		case genErr != nil:
			return nil, 0, genErr
		case before == after:
			return have, before, err
		}
	}
	return nil, 0, errors.New("read the table: others change the rule set all the time")
}

func (r *Ruleset) readOnce(t table) (elements, error) {
	in := r.table(t)
	chains, err := r.conn.ListChainsOfTableFamily(in.Family)
	if err != nil {
		return nil, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != t.name })
	if len(chains) != len(t.chains) {
		return nil, errStrange
	}
	for _, want := range t.chains {
		i := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Name == want.name })
		if i < 0 || chains[i].Type != want.kind || !reflect.DeepEqual(chains[i].Hooknum, want.hook) || !reflect.DeepEqual(chains[i].Priority, want.priority) {
			return nil, errStrange
		}
		rules, err := r.conn.GetRules(in.Table, chains[i])
		if err != nil {
			return nil, err
		}
		if !slices.EqualFunc(rules, want.rules, isRule) {
			return nil, errStrange
		}
	}
	sets, err := careful(func() ([]*nftables.Set, error) { return r.conn.GetSets(in.Table) })
	if err != nil {
		return nil, err
	}
	if len(sets) != len(t.sets) {
		return nil, errStrange
	}
	have := elements{}
	for _, want := range t.sets {
		i := slices.IndexFunc(sets, func(s *nftables.Set) bool { return s.Name == want.name })
		// Comments are not compared: of sets with intervals the library does not read them.
		if i < 0 || sets[i].Interval != want.interval || sets[i].KeyType.Name != want.key().Name {
			return nil, errStrange
		}
		found, err := careful(func() ([]nftables.SetElement, error) { return r.conn.GetSetElements(sets[i]) })
		if err != nil {
			return nil, err
		}
		var ok bool
		if have[want.name], ok = want.members(found); !ok {
			return nil, errStrange
		}
	}
	return have, nil
}

// careful reads by the library, which panics at user data that says it is longer than it is (as of v0.3.0). None of ours does, so
// the table is somebody else's work then, and is made anew.
func careful[T any](read func() (T, error)) (have T, err error) {
	defer func() {
		if recover() != nil {
			err = errStrange
		}
	}()
	return read()
}

// isRule says whether a rule of the kernel's is the one that we would make.
func isRule(have *nftables.Rule, want rule) bool {
	if comment := commentOf(have.UserData, userdata.TypeComment); comment != want.comment {
		return false
	}
	return slices.EqualFunc(have.Exprs, want.exprs, func(a, b expr.Any) bool {
		switch x := a.(type) { // the sets' numbers are the kernel's own
		case *expr.Lookup:
			named := *x
			named.SetID = 0
			a = &named
		case *expr.Dynset:
			named := *x
			named.SetID = 0
			if len(named.Exprs) == 0 {
				named.Exprs = nil
			}
			a = &named
		case *expr.Counter: // packets change it
			a = &expr.Counter{}
		}
		return reflect.DeepEqual(a, b)
	})
}

// inKernel is a table as the library wants it.
type inKernel struct{ *nftables.Table }

func (r *Ruleset) table(t table) inKernel {
	return inKernel{&nftables.Table{Family: nftables.TableFamilyINet, Name: t.name}}
}

func (t inKernel) set(s set) *nftables.Set {
	return &nftables.Set{Table: t.Table, Name: s.name, KeyType: s.key(), Interval: s.interval, Concatenation: s.isPaired(), Comment: s.comment}
}

func (s set) isPaired() bool { return s.pairedWith != 0 }

func (s set) key() nftables.SetDatatype {
	if s.isPaired() {
		return nftables.MustConcatSetType(addrType(s.pairedWith), addrType(s.family))
	}
	return addrType(s.family)
}

func addrType(f inet.Family) nftables.SetDatatype {
	if f == inet.IPv4 {
		return nftables.TypeIPAddr
	}
	return nftables.TypeIP6Addr
}

// elements queues a change of elements, in messages that a netlink attribute's 64 KiB have room for.
func (r *Ruleset) elements(list []member, s set, kernel *nftables.Set, change func(*nftables.Set, []nftables.SetElement) error) error {
	const room = 500
	for part := range slices.Chunk(list, room) {
		var all []nftables.SetElement
		for _, m := range part {
			p := m.prefix
			if s.isPaired() {
				all = append(all, nftables.SetElement{Key: append(m.first.AsSlice(), p.Addr().AsSlice()...)})
				continue
			}
			all = append(all, nftables.SetElement{Key: p.Addr().AsSlice()})
			if !s.interval {
				continue
			}
			if end := inet.Last(p).Next(); end.IsValid() { // what reaches to the last address of all has no end
				all = append(all, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
		if err := change(kernel, all); err != nil {
			return err
		}
	}
	return nil
}

// sameBits returns how many bits two addresses of one family begin with in common.
func sameBits(a, b netip.Addr) int {
	x, y := a.As16(), b.As16()
	for i := range x {
		if n := bits.LeadingZeros8(x[i] ^ y[i]); n < 8 {
			return i*8 + n - (128 - a.BitLen())
		}
	}
	return a.BitLen()
}

// members is the reverse of elements. It is not ok if there is something that is no prefix: it is not ours.
func (s set) members(found []nftables.SetElement) ([]member, bool) {
	if s.isPaired() {
		return s.pairs(found)
	}
	return s.singles(found)
}

// pairs is members of a set of pairs.
func (s set) pairs(found []nftables.SetElement) ([]member, bool) {
	size := words(s.pairedWith) * 4
	list := make([]member, 0, len(found))
	for _, e := range found {
		if len(e.Key) != size+words(s.family)*4 {
			return nil, false
		}
		first, _ := netip.AddrFromSlice(e.Key[:size])
		addr, _ := netip.AddrFromSlice(e.Key[size:])
		p := netip.PrefixFrom(addr, s.bits)
		if p != p.Masked() {
			return nil, false
		}
		list = append(list, member{first, p})
	}
	sortPairs(list)
	return list, true
}

func sortPairs(list []member) {
	slices.SortFunc(list, func(a, b member) int {
		return cmp.Or(a.first.Compare(b.first), a.prefix.Addr().Compare(b.prefix.Addr()))
	})
}

// prefixFrom returns the prefix that reaches from one address to another, if there is one.
func prefixFrom(from, to netip.Addr) (netip.Prefix, bool) {
	p := netip.PrefixFrom(from, sameBits(from, to))
	return p, p == p.Masked() && inet.Last(p) == to
}

// singles is members of a set of addresses or prefixes.
func (s set) singles(found []nftables.SetElement) ([]member, bool) {
	type bound struct {
		addr netip.Addr
		end  bool
	}
	bounds := make([]bound, 0, len(found))
	for _, e := range found {
		a, ok := netip.AddrFromSlice(e.Key)
		if !ok {
			return nil, false
		}
		bounds = append(bounds, bound{a, e.IntervalEnd})
	}
	slices.SortFunc(bounds, func(a, b bound) int {
		if c := a.addr.Compare(b.addr); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	var list []member
	for i, b := range bounds {
		if b.end {
			continue
		}
		p := netip.PrefixFrom(b.addr, b.addr.BitLen())
		if s.interval {
			to := inet.Last(netip.PrefixFrom(b.addr, 0)) // without an end: the last address of all
			if i+1 < len(bounds) {
				if !bounds[i+1].end {
					return nil, false
				}
				to = bounds[i+1].addr.Prev()
			}
			var ok bool
			if p, ok = prefixFrom(b.addr, to); !ok {
				return nil, false
			}
		}
		list = append(list, member{prefix: p})
	}
	return list, true
}
