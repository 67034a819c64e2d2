package fastpath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Policies are the maps by which the fast path judges connections of pods that NetworkPolicies isolate. They allow, and nothing else: what they do
// not allow is the stack's, whose rules decide. So whatever does not fit is left out, and what changes is taken away before it is written anew.
type Policies struct {
	maps *bpfMaps

	mu sync.Mutex
	// held are the facts that the maps were made of, nil if it is not known.
	held    *policy.Facts
	begun   bool         // Set was called
	leftOut map[any]bool // keys that did not fit
}

// judgeValue is the value of the map Judge.
type judgeValue struct{ Generation, On, Keep uint32 }

// Set makes the maps hold what facts say, and returns the number of elements that it changed. From then on they are asked. Connections that were judged
// before are judged again, by their next packet, if anything has changed, or may have: somebody before may have ended in the middle of it.
func (p *Policies) Set(f policy.Facts) (c diff.Count, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held, p.leftOut = nil, map[any]bool{}
	have, err := p.read()
	if err != nil {
		return c, err
	}
	c, err = p.change(have, elementsOf(f))
	if err := errors.Join(err, p.forgetOff(), p.turn(func(j *judgeValue) {
		if c != (diff.Count{}) || !p.begun {
			j.Generation++
		}
	})); err != nil {
		return c, err
	}
	if err := p.turn(func(j *judgeValue) { j.On = 1 }); err != nil {
		return c, err
	}
	p.begun = true
	p.held = &policy.Facts{Addrs: maps.Clone(f.Addrs), Classes: maps.Clone(f.Classes)}
	return c, nil
}

// Change does what Set would, for what has changed (policy.Model.Changes), and reads nothing. If it fails, Set is to be called.
func (p *Policies) Change(changes policy.Facts) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held == nil {
		return errors.New("change what the fast path knows of policies: it was not set before")
	}
	held := p.held
	p.held = nil
	was := policy.Facts{Addrs: map[netip.Addr]policy.Address{}, Classes: map[policy.Number]*policy.Class{}}
	for a := range changes.Addrs {
		was.Addrs[a] = held.Addrs[a]
	}
	now := policy.Facts{Addrs: changes.Addrs, Classes: map[policy.Number]*policy.Class{}}
	for n, is := range changes.Classes {
		was.Classes[n], now.Classes[n] = held.Classes[n], is
		if was.Classes[n] != nil && is != nil {
			was.Classes[n], now.Classes[n] = policy.Apart(was.Classes[n], is)
		}
	}
	c, err := p.change(elementsOf(was), elementsOf(now))
	if c != (diff.Count{}) {
		err = errors.Join(err, p.turn(func(j *judgeValue) { j.Generation++ }))
	}
	if err != nil {
		return err
	}
	for a, is := range changes.Addrs {
		if held.Addrs[a] = is; is == (policy.Address{}) {
			delete(held.Addrs, a)
		}
	}
	for n, is := range changes.Classes {
		if held.Classes[n] = is; is == nil {
			delete(held.Classes, n)
		}
	}
	p.held = held
	return nil
}

// Off has the stack judge all pods that policies isolate, until Set. What is known of connections stays.
func (p *Policies) Off() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = nil
	return p.turn(func(j *judgeValue) { j.On = 0 })
}

// forgetOff forgets all connections while the maps are off: the stack has seen some of their packets.
func (p *Policies) forgetOff() error {
	var j judgeValue
	if err := p.maps.FathomJudge.Lookup(uint32(0), &j); err != nil || j.On != 0 {
		return err
	}
	list, err := p.Flows()
	return errors.Join(err, p.Forget(list))
}

// Keep says whether connections that are there stay allowed when policies forbid them.
func (p *Policies) Keep(keep bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.turn(func(j *judgeValue) {
		if j.Keep = 0; keep {
			j.Keep = 1
		}
	})
}

// Holds says whether the maps hold what Set and Change left there. It may be called beside them, and delays them little.
func (p *Policies) Holds() (bool, error) {
	p.mu.Lock()
	if p.held == nil {
		p.mu.Unlock()
		return false, nil
	}
	want := elementsOf(*p.held)
	p.mu.Unlock()
	if d, err := p.differences(want); err != nil || len(d) == 0 {
		return err == nil, err
	}
	p.mu.Lock() // it may have changed meanwhile
	defer p.mu.Unlock()
	if p.held == nil {
		return false, nil
	}
	d, err := p.differences(elementsOf(*p.held))
	return len(d) == 0 && err == nil, err
}

// judges says whether the policies of a pod of the node are asked by the maps.
func (p *Policies) judges(key pin.Key) (bool, error) {
	var j judgeValue
	var v identityValue
	if err := p.maps.FathomJudge.Lookup(uint32(0), &j); err != nil {
		return false, fmt.Errorf("read the map %s: %w", pin.Judge, err)
	}
	if err := bpf.IgnoreMissing(p.maps.FathomIdentities.Lookup(key, &v)); err != nil {
		return false, fmt.Errorf("read the map %s: %w", pin.Identities, err)
	}
	return j.On != 0 && v.Judged != 0, nil
}

// LeftOut is the number of elements that did not fit into the maps.
func (p *Policies) LeftOut() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.leftOut)
}

// Check compares the maps with facts, and changes nothing.
func (p *Policies) Check(f policy.Facts) ([]bpf.Difference, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.differences(elementsOf(f))
}

func (p *Policies) differences(want elements) ([]bpf.Difference, error) {
	have, err := p.read()
	if err != nil {
		return nil, err
	}
	fits(want.identities, have.identities, p.maps.FathomIdentities)
	fits(want.allowed, have.allowed, p.maps.FathomAllowed)
	fits(want.blocks, have.blocks, p.maps.FathomBlocks)
	d := bpf.Compare(want.identities, have.identities, func(k pin.Key) string { return "identity of " + k.Addr().String() }, func(v identityValue) string {
		return fmt.Sprintf("%d, judged here %d, classes %04x and %04x", v.Number, v.Judged, v.Ingress, v.Egress)
	})
	d = append(d, bpf.Compare(want.allowed, have.allowed, allowedKey.String, func(uint32) string { return "allowed" })...)
	return append(d, bpf.Compare(want.blocks, have.blocks, blockKey.String, func(v uint32) string { return fmt.Sprintf("as peer %08x", v) })...), nil
}

// fits leaves out of what is wanted what is missing from a map that is full.
func fits[K, V comparable](want, have map[K]V, m *ebpf.Map) {
	if len(have) >= int(m.MaxEntries()) {
		maps.DeleteFunc(want, func(k K, _ V) bool { _, there := have[k]; return !there })
	}
}

func (k allowedKey) String() string {
	return fmt.Sprintf("port %d/%d of class %04x with peer %08x", uint16(k.Port[0])<<8|uint16(k.Port[1]), int(k.Length)-48, k.Class, k.Peer)
}

func (k blockKey) String() string {
	return fmt.Sprintf("block %s of class %04x", prefixKey{Length: k.Length - 32, Address: k.Address}, k.Class)
}

func (p *Policies) read() (elements, error) {
	e := newElements()
	for name, err := range map[string]error{
		pin.Identities: readMap(p.maps.FathomIdentities, e.identities),
		pin.Allowed:    readMap(p.maps.FathomAllowed, e.allowed),
		pin.Blocks:     readMap(p.maps.FathomBlocks, e.blocks),
	} {
		if err != nil {
			return e, fmt.Errorf("read the map %s: %w", name, err)
		}
	}
	return e, nil
}

// change brings the maps from what they have of something to what is wanted. Numbers may stand for something else than before. So who had them
// is taken away first, then what they are allowed, and they are given when all is there that follows from them.
func (p *Policies) change(have, want elements) (c diff.Count, err error) {
	errs := []error{
		take(p, pin.Identities, p.maps.FathomIdentities, have.identities, want.identities, &c),
		take(p, pin.Blocks, p.maps.FathomBlocks, have.blocks, want.blocks, &c),
		take(p, pin.Allowed, p.maps.FathomAllowed, have.allowed, want.allowed, &c),
	}
	if err := errors.Join(errs...); err != nil {
		return c, err // what is to go may still be there: nothing comes
	}
	return c, errors.Join(
		give(p, pin.Allowed, p.maps.FathomAllowed, have.allowed, want.allowed, &c),
		give(p, pin.Blocks, p.maps.FathomBlocks, have.blocks, want.blocks, &c),
		give(p, pin.Identities, p.maps.FathomIdentities, have.identities, want.identities, &c),
	)
}

func take[K, V comparable](p *Policies, name string, m *ebpf.Map, have, want map[K]V, c *diff.Count) error {
	for k, v := range have {
		if w, wanted := want[k]; wanted && w == v {
			continue
		}
		if err := bpf.IgnoreMissing(m.Delete(k)); err != nil {
			return fmt.Errorf("delete from the map %s: %w", name, err)
		}
		delete(p.leftOut, k)
		c.Removed++
	}
	return nil
}

func give[K, V comparable](p *Policies, name string, m *ebpf.Map, have, want map[K]V, c *diff.Count) error {
	for k, v := range want {
		if h, there := have[k]; there && h == v {
			continue
		}
		switch err := m.Update(k, v, ebpf.UpdateAny); {
		case errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC):
			p.leftOut[k] = true
		case err != nil:
			return fmt.Errorf("write the map %s: %w", name, err)
		default:
			c.Added++
		}
	}
	return nil
}

func (p *Policies) turn(how func(*judgeValue)) error {
	var j judgeValue
	if err := p.maps.FathomJudge.Lookup(uint32(0), &j); err != nil {
		return fmt.Errorf("read the map %s: %w", pin.Judge, err)
	}
	was := j
	if how(&j); j == was {
		return nil
	}
	if err := p.maps.FathomJudge.Update(uint32(0), j, ebpf.UpdateAny); err != nil {
		return fmt.Errorf("write the map %s: %w", pin.Judge, err)
	}
	return nil
}
