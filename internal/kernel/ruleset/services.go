package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// heldServices is what the table of Services holds, as far as we know.
type heldServices struct {
	*holding          // nil if nothing is known
	generation uint32 // of the kernel's whole rule set, at which it was certain
}

// SetServices makes the kernel balance Services as p says, and returns the number of elements that it changed. A table
// that is damaged is made anew. Connections that are there stay with their endpoints in any case: conntrack knows them.
// But clients with affinity that come anew after that may meet another.
func (r *Ruleset) SetServices(p service.Plan) (diff.Count, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	count, err := r.setServices(p)
	if err != nil {
		r.services.holding = nil
		return diff.Count{}, fmt.Errorf("set nftables table inet %s: %w", ServicesTable, err)
	}
	return count, nil
}

func (r *Ruleset) setServices(p service.Plan) (diff.Count, error) {
	want, err := AsHeld(p)
	if err != nil {
		return diff.Count{}, err
	}
	have, before, err := r.readServices()
	if errors.Is(err, errStrange) {
		return diff.Count{Added: 1}, r.replaceServices(want)
	}
	if err != nil {
		return diff.Count{}, err
	}
	var count diff.Count
	w := writer{to: r.socket, count: &count}
	err = have.become(want, &w)
	if err == nil {
		err = w.flush()
	}
	if err != nil {
		// Elements that somebody else added or took away meanwhile, or ones that only look like ours.
		return diff.Count{Added: 1}, r.replaceServices(want)
	}
	r.learnServices(have, before, w.transactions)
	return count, nil
}

// ChangeServices does what SetServices would, for a few Services and in a fraction of a millisecond, in one
// transaction: it reads nothing. If it fails, what the kernel holds is not what it was thought to, and SetServices is to
// be called.
//
// Where it makes a chain, for the first frontend with so many endpoints or for a Service with affinity, the kernel goes
// through the whole map of endpoints that the chain is to use: some milliseconds if they are a hundred thousand.
func (r *Ruleset) ChangeServices(changes []service.Change) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.services.holding == nil {
		return fmt.Errorf("change nftables table inet %s: it was not set before", ServicesTable)
	}
	if err := r.changeServices(changes); err != nil {
		r.services.holding = nil
		return fmt.Errorf("change nftables table inet %s: %w", ServicesTable, err)
	}
	return nil
}

func (r *Ruleset) changeServices(changes []service.Change) error {
	h := r.services.holding
	before, err := r.socket.generation()
	if err != nil {
		return err
	}
	// First what all of them no longer have, then what they have now: an address may go from one to another.
	now := map[service.Key]*service.Frontend{}
	for _, c := range changes {
		for _, f := range c.Old {
			held, err := asHeld(f)
			if err != nil {
				return err
			}
			if there, found := h.frontends[f.Key]; !found || !there.Equal(held) {
				return fmt.Errorf("%s is not what the change of %s says", f.Key, c.Service)
			}
			now[f.Key] = nil
		}
	}
	for _, c := range changes {
		for _, f := range c.New {
			held, err := asHeld(f)
			if err != nil {
				return err
			}
			old, changed := now[f.Key]
			if _, found := h.frontends[f.Key]; old != nil || found && !changed {
				return fmt.Errorf("%s of Service %s is another's already", f.Key, c.Service)
			}
			now[f.Key] = &held
		}
	}
	w := writer{to: r.socket, whole: true}
	for _, k := range slices.SortedFunc(maps.Keys(now), service.Key.Compare) {
		if err := h.change(k, now[k], &w); err != nil {
			return err
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	if before == r.services.generation { // else it is as uncertain as before
		r.learnServices(h, before, w.transactions)
	}
	return nil
}

// Services reads back what SetServices set, as AsHeld says it. A table that is not there, or that does something else, is
// as good as one that holds nothing.
func (r *Ruleset) Services() (service.Plan, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	h, _, err := r.readServices()
	if errors.Is(err, errStrange) {
		return service.Plan{}, nil
	}
	if err != nil {
		return service.Plan{}, fmt.Errorf("read nftables table inet %s: %w", ServicesTable, err)
	}
	return h.plan(), nil
}

// AffinityFull returns the IDs (service.ID) of Services a client of which found no room to be remembered in the last minute.
func (r *Ruleset) AffinityFull() ([]uint32, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []uint32
	for _, f := range inet.Families {
		list, err := r.readElements(named(affinityFull, f))
		if errors.Is(err, errStrange) {
			continue // there is none
		}
		if err != nil {
			return nil, fmt.Errorf("read nftables table inet %s: %w", ServicesTable, err)
		}
		for _, e := range list {
			if len(e.key) == 4 {
				all = append(all, binary.NativeEndian.Uint32([]byte(e.key)))
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// DeleteServices takes the table away. One that is not there is not an error. Connections to Services then last only if
// another table has chains for NAT at the same hooks, for without any the kernel translates nothing.
func (r *Ruleset) DeleteServices() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.services.holding = nil
	return r.Delete(ServicesTable)
}

// learnServices keeps in mind what the table holds, and that it is certain if only our transactions came since a
// generation.
func (r *Ruleset) learnServices(h *holding, before, transactions uint32) {
	r.services.holding = h
	if after, err := r.socket.generation(); err == nil && after == before+transactions {
		r.services.generation = after
	} else {
		r.services.generation = 0 // never a rule set's that has a table
	}
}

// replaceServices makes the table anew. Packets meet the old one or the new one; only a very large one comes in parts.
func (r *Ruleset) replaceServices(want service.Plan) error {
	before, err := r.socket.generation()
	if err != nil {
		return err
	}
	h := newHolding()
	w := writer{to: r.socket, anew: true}
	if err := h.become(want, &w); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	r.learnServices(h, before, w.transactions)
	return nil
}

// errElements says that the elements of the table are not as we make them. A large map that the kernel is still making
// room for, after elements came to it, is listed with some of them twice and others not at all, and no generation tells.
var errElements = fmt.Errorf("%w: its elements do not fit together", errStrange)

// readServices returns what the table holds, and at which generation. The error is errStrange if it is not as we make it.
func (r *Ruleset) readServices() (*holding, uint32, error) {
	const enough, doubts = 20, 2
	for try := range enough {
		before, err := r.socket.generation()
		if err != nil {
			return nil, 0, err
		}
		if r.services.holding != nil && r.services.generation == before {
			return r.services.holding, before, nil // no transaction since, so it cannot have changed
		}
		have, err := r.readServicesOnce()
		after, genErr := r.socket.generation()
		switch {
		case genErr != nil:
			return nil, 0, genErr
		case before == after && (try >= doubts || !errors.Is(err, errElements)):
			return have, before, err
		}
	}
	return nil, 0, errors.New("read the table: others change the rule set all the time")
}

func (r *Ruleset) readServicesOnce() (*holding, error) {
	if err := r.compareSets(); err != nil {
		return nil, err
	}
	sets := map[string][]element{}
	for _, s := range serviceSets() {
		if s.timeout {
			continue // packets fill it
		}
		list, err := r.readElements(s.name)
		if err != nil {
			return nil, err
		}
		sets[s.name] = list
	}
	p, ok := decode(sets)
	if !ok {
		return nil, errElements
	}
	h := newHolding()
	all := writer{}
	if err := h.become(p, &all); err != nil {
		return nil, errElements
	}
	all.settle()
	for name, list := range sets {
		if !sameElements(list, all.add[name]) {
			return nil, errElements
		}
	}
	return h, r.compareChains(h)
}

func (r *Ruleset) readElements(set string) (list []element, err error) {
	err = r.eachElementOf(set, func(e element) { list = append(list, e) })
	return list, err
}

func (r *Ruleset) eachElementOf(set string, f func(element)) error {
	err := r.socket.dump(unix.NFT_MSG_GETSETELEM, func(t *transaction) {
		t.text(unix.NFTA_SET_ELEM_LIST_TABLE, ServicesTable)
		t.text(unix.NFTA_SET_ELEM_LIST_SET, set)
	}, func(b []byte) {
		eachAttribute(b, func(kind uint16, data []byte) {
			if kind == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				eachAttribute(data, func(_ uint16, e []byte) { f(elementOf(e)) })
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return errStrange
	}
	if err != nil {
		return fmt.Errorf("read the set %s: %w", set, err)
	}
	return nil
}

func sameElements(a, b []element) bool {
	if len(a) != len(b) {
		return false
	}
	type id struct {
		key string
		end bool
	}
	have := make(map[id]element, len(a))
	for _, e := range a {
		have[id{e.key, e.end}] = e
	}
	for _, e := range b {
		if have[id{e.key, e.end}] != e {
			return false
		}
	}
	return true
}

// compareSets returns errStrange if the table's sets are not the ones that there should be.
func (r *Ruleset) compareSets() error {
	type shape struct{ flags, keyType, keySize, dataType, dataSize uint32 }
	have := map[string]shape{}
	err := r.socket.dump(unix.NFT_MSG_GETSET, func(t *transaction) { t.text(unix.NFTA_SET_TABLE, ServicesTable) }, func(b []byte) {
		var name string
		var s shape
		eachAttribute(b, func(kind uint16, data []byte) {
			to := map[uint16]*uint32{unix.NFTA_SET_FLAGS: &s.flags, unix.NFTA_SET_KEY_TYPE: &s.keyType, unix.NFTA_SET_KEY_LEN: &s.keySize,
				unix.NFTA_SET_DATA_TYPE: &s.dataType, unix.NFTA_SET_DATA_LEN: &s.dataSize}[kind]
			switch {
			case kind == unix.NFTA_SET_NAME && len(data) > 0:
				name = string(data[:len(data)-1])
			case to != nil && len(data) == 4:
				*to = uint32(data[0])<<24 | uint32(data[1])<<16 | uint32(data[2])<<8 | uint32(data[3])
			}
		})
		if s.dataType == unix.NFT_DATA_VERDICT {
			s.dataSize = 0 // the kernel's own matter
		}
		have[name] = s
	})
	if errors.Is(err, unix.ENOENT) {
		return errStrange
	}
	if err != nil {
		return fmt.Errorf("list the sets: %w", err)
	}
	want := map[string]shape{}
	for _, s := range serviceSets() {
		made := shape{flags: s.flags(), keyType: s.key.GetNFTMagic(), keySize: s.key.Bytes}
		if s.isMap() {
			made.dataType, made.dataSize = s.dataType()
		}
		want[s.name] = made
	}
	if !maps.Equal(have, want) {
		return errStrange
	}
	return nil
}

// compareChains returns errStrange if the table's chains are not the ones that there should be.
func (r *Ruleset) compareChains(h *holding) error {
	in := &nftables.Table{Family: nftables.TableFamilyINet, Name: ServicesTable}
	have, err := r.conn.ListChainsOfTableFamily(in.Family)
	if err != nil {
		return err
	}
	have = slices.DeleteFunc(have, func(c *nftables.Chain) bool { return c.Table.Name != in.Name })
	want := map[string]chain{}
	for _, c := range serviceChains() {
		want[c.name] = c
	}
	for t := range h.targets {
		want[t.name()] = t.chain()
	}
	if len(have) != len(want) {
		return errStrange
	}
	for _, c := range have {
		w, found := want[c.Name]
		if !found || c.Type != w.kind || !reflect.DeepEqual(c.Hooknum, w.hook) || !reflect.DeepEqual(c.Priority, w.priority) ||
			c.Policy != nil && *c.Policy != nftables.ChainPolicyAccept {
			return errStrange
		}
		rules, err := r.conn.GetRules(in, c)
		if err != nil {
			return err
		}
		if !slices.EqualFunc(rules, w.rules, isRule) {
			return errStrange
		}
	}
	return nil
}

// AsHeld returns a plan as the kernel holds it, and Services returns it: sorted, without what has no consequence there.
func AsHeld(p service.Plan) (service.Plan, error) {
	held := service.Plan{Frontends: make([]service.Frontend, 0, len(p.Frontends)), NodePortAddrs: slices.Clone(p.NodePortAddrs),
		OwnPods: outermost(p.OwnPods)}
	for _, f := range p.Frontends {
		f, err := asHeld(f)
		if err != nil {
			return held, err
		}
		held.Frontends = append(held.Frontends, f)
	}
	slices.SortFunc(held.Frontends, func(a, b service.Frontend) int { return a.Compare(b.Key) })
	for i := range held.Frontends[min(1, len(held.Frontends)):] {
		if f := held.Frontends[i+1]; f.Key == held.Frontends[i].Key {
			return held, fmt.Errorf("%s is both of Service %s and of %s", f.Key, held.Frontends[i].Service, f.Service)
		}
	}
	slices.SortFunc(held.NodePortAddrs, netip.Addr.Compare)
	held.NodePortAddrs = slices.Compact(held.NodePortAddrs)
	return held, nil
}
