package lease

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// Fake is Leases in memory, for tests.
type Fake struct {
	CoolDown time.Duration
	Now      func() time.Time // nil: time.Now

	mu      sync.Mutex
	leases  map[Attachment]Lease
	cooling map[netip.Addr]cooling
	last    map[string]netip.Addr
}

type cooling struct {
	from  time.Time
	lease Lease
}

var _ Leases = (*Fake)(nil)

func (f *Fake) now() time.Time {
	if f.Now == nil {
		return time.Now()
	}
	return f.Now()
}

// Acquire implements Leases.
func (f *Fake) Acquire(l Lease, choose func(ipam.State) (ipam.Choice, error)) (Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if there, found := f.leases[l.Attachment]; found {
		return Lease{}, &ExistsError{there}
	}
	s := ipam.State{InUse: map[netip.Addr]bool{}, Cooling: map[netip.Addr]bool{}, Last: maps.Clone(f.last)}
	for _, other := range f.leases {
		for _, a := range other.Addresses {
			s.InUse[a] = true
		}
	}
	rested := map[netip.Addr]time.Duration{}
	for a, c := range f.cooling {
		if f.now().Sub(c.from) >= f.CoolDown {
			delete(f.cooling, a)
		} else if !slices.Contains(l.Addresses, a) || !c.lease.SamePod(l) {
			s.Cooling[a] = true
			rested[a] = f.now().Sub(c.from)
		}
	}
	s.Yield = yield(rested, f.CoolDown/leastRest)
	choice, err := choose(s)
	if err != nil {
		return Lease{}, err
	}
	l.Pool, l.Addresses, l.Time = choice.Pool, choice.Addresses, f.now()
	if f.leases == nil {
		f.leases, f.cooling, f.last = map[Attachment]Lease{}, map[netip.Addr]cooling{}, map[string]netip.Addr{}
	}
	f.leases[l.Attachment] = l
	maps.Copy(f.last, choice.Last)
	return l, nil
}

// Find implements Leases.
func (f *Fake) Find(a Attachment) (Lease, bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, found := f.leases[a]
	return l, found, nil
}

// List implements Leases.
func (f *Fake) List() ([]Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.leases)), nil
}

// Release implements Leases.
func (f *Fake) Release(a Attachment) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.leases[a]
	for _, address := range l.Addresses {
		f.cooling[address] = cooling{f.now(), l}
	}
	delete(f.leases, a)
	return nil
}
