package lease

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/bootclock"
)

const (
	addressesDir   = "addresses"
	attachmentsDir = "attachments"
	coolingDir     = "cooling"
	poolsFile      = "pools"
)

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

func (s *Store) address(a netip.Addr) string { return filepath.Join(s.dir, addressesDir, a.String()) }

func (s *Store) attachment(a Attachment) string {
	name := a.ContainerID + "@" + a.IfName // neither can have a / or an @
	if len(name) > 255 {
		name = fmt.Sprintf("%x@%s", sha256.Sum256([]byte(a.ContainerID)), a.IfName)
	}
	return filepath.Join(s.dir, attachmentsDir, name)
}

// damagedError says that a file exists but cannot be read as a lease.
type damagedError struct{ error }

func isDamaged(err error) bool {
	var d *damagedError
	return errors.As(err, &d)
}

func read(path string) (Lease, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Lease{}, err
	}
	l, err := parse(data)
	if err != nil {
		return Lease{}, &damagedError{fmt.Errorf("read the lease %s: %w", path, err)}
	}
	return l, nil
}

// parse reads a lease. Names of files and devices are derived from it, so a value that cannot be one counts as damage.
func parse(data []byte) (Lease, error) {
	var l Lease
	if err := json.Unmarshal(data, &l); err != nil {
		return Lease{}, err
	}
	for _, name := range []string{l.ContainerID, l.IfName} {
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return Lease{}, fmt.Errorf("%q is no name of a container or of an interface", name)
		}
	}
	if slices.ContainsFunc(l.Addresses, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" }) {
		return Lease{}, fmt.Errorf("%v are no addresses of a pod", l.Addresses)
	}
	return l, nil
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a lease: %w", err)
	}
	return nil
}

// cool moves an address from those in use to those that cool down, in one step.
func (s *Store) cool(a netip.Addr) error {
	if err := os.Rename(s.address(a), filepath.Join(s.dir, coolingDir, coolingName(a, s.now()))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release address %s: %w", a, err)
	}
	return nil
}

// coolLost is cool for an address whose file is lost; the attachment's lease names its pod.
func (s *Store) coolLost(of Attachment, a netip.Addr) error {
	if err := os.Link(s.attachment(of), filepath.Join(s.dir, coolingDir, coolingName(a, s.now()))); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("release address %s: %w", a, err)
	}
	return nil
}

// state reads what is in use and what cools down, and removes what has cooled down.
func (s *Store) state(l Lease) (ipam.State, error) {
	state := ipam.State{InUse: map[netip.Addr]bool{}, Cooling: map[netip.Addr]bool{}, Last: map[string]netip.Addr{}}
	names, err := list(s.path(addressesDir))
	if err != nil {
		return state, err
	}
	for _, n := range names {
		if a, err := netip.ParseAddr(n); err == nil {
			state.InUse[a] = true
		}
	}
	if names, err = list(s.path(coolingDir)); err != nil {
		return state, err
	}
	now := s.now()
	rested := map[netip.Addr]time.Duration{}
	for _, n := range names {
		path := filepath.Join(s.dir, coolingDir, n)
		a, released, ok := parseCooling(n)
		if !ok {
			continue // no file of ours
		}
		since := now.Since(released)
		if since >= s.coolDown {
			_ = os.Remove(path) // one that stays is looked at again the next time
			continue
		}
		if before, more := rested[a]; !more || since < before {
			rested[a] = since
		}
		state.Cooling[a] = true
	}
	state.Yield = yield(rested, s.coolDown/leastRest)
	for _, a := range l.Addresses {
		if state.Cooling[a] && s.wasHeldBy(a, l, names) {
			delete(state.Cooling, a)
		}
	}
	state.Pools = s.pools()
	data, err := os.ReadFile(s.path("last"))
	if err == nil {
		err = json.Unmarshal(data, &state.Last)
	}
	if err != nil || state.Last == nil {
		state.Last = map[string]netip.Addr{} // it is only a preference: start at the beginning
	}
	return state, nil
}

// leastRest is the inverse of the part of the cool-down that every address rests, however few are left.
const leastRest = 10

// yield lists the addresses that have rested at least that long, the longest first.
func yield(rested map[netip.Addr]time.Duration, least time.Duration) []netip.Addr {
	maps.DeleteFunc(rested, func(_ netip.Addr, d time.Duration) bool { return d < least })
	return slices.SortedFunc(maps.Keys(rested), func(a, b netip.Addr) int {
		return cmp.Or(cmp.Compare(rested[b], rested[a]), a.Compare(b))
	})
}

// warm removes the file of a cooling address that was assigned to a pod early. Otherwise readers of the store would take it
// for free.
func (s *Store) warm(a netip.Addr) error {
	names, err := list(s.path(coolingDir))
	for _, n := range names {
		if of, _, ok := parseCooling(n); ok && of == a {
			err = errors.Join(err, remove(filepath.Join(s.dir, coolingDir, n)))
		}
	}
	return err
}

func coolingName(a netip.Addr, released bootclock.Instant) string {
	return fmt.Sprintf("%s@%d@%s", a, released.At.Milliseconds(), released.Boot)
}

// parseCooling parses a name that coolingName made. One without a boot, as older versions wrote it by the wall clock, is
// from before this boot.
func parseCooling(name string) (a netip.Addr, released bootclock.Instant, ok bool) {
	address, rest, _ := strings.Cut(name, "@")
	a, err := netip.ParseAddr(address)
	if err != nil {
		return a, released, false
	}
	millis, boot, _ := strings.Cut(rest, "@")
	n, err := strconv.ParseInt(millis, 10, 64)
	if err != nil {
		return a, released, false
	}
	if boot == "" || n < 0 || n > int64(math.MaxInt64/time.Millisecond) {
		return a, released, true
	}
	return a, bootclock.Instant{Boot: boot, At: time.Duration(n) * time.Millisecond}, true
}

// wasHeldBy reports whether each lease that the address cools down from was of the same pod.
func (s *Store) wasHeldBy(a netip.Addr, l Lease, cooling []string) bool {
	for _, n := range cooling {
		if !strings.HasPrefix(n, a.String()+"@") {
			continue
		}
		// One that vanished since it was listed has cooled down.
		last, err := read(filepath.Join(s.dir, coolingDir, n))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || !last.SamePod(l) {
			return false
		}
	}
	return true
}

// pools returns what SetPools wrote. If it cannot be read there are none: the agent writes it again.
func (s *Store) pools() []ipam.Pool {
	data, err := os.ReadFile(s.path(poolsFile))
	if err != nil {
		return nil
	}
	return parsePools(data)
}

func parsePools(data []byte) []ipam.Pool {
	var pools []ipam.Pool
	if err := json.Unmarshal(data, &pools); err != nil {
		return nil
	}
	for _, p := range pools {
		if slices.ContainsFunc(p.Ranges, func(r netip.Prefix) bool { return !r.IsValid() }) {
			return nil
		}
	}
	return pools
}

// SetPools replaces the pools that addresses are assigned from in addition to those of the configuration, and returns what
// is in use and what cools down at that moment. Acquire reads the pools under the same lock: if an address is not in use
// when its range is removed, it is not assigned any more, however old a running plugin's information is. Only the one agent
// calls SetPools.
func (s *Store) SetPools(pools []ipam.Pool) (ipam.State, error) {
	data, err := json.Marshal(pools)
	if err != nil {
		return ipam.State{}, err
	}
	var staged *durable.Staged
	if have, err := os.ReadFile(s.path(poolsFile)); err != nil && len(pools) > 0 || err == nil && !bytes.Equal(have, data) {
		// The slowest disk access comes before the lock, for which plugins wait.
		if staged, err = durable.Stage(s.path(poolsFile), bytes.NewReader(data), 0o644); err != nil {
			return ipam.State{}, fmt.Errorf("write the pools of the store of leases: %w", err)
		}
	}
	unlock, err := s.lock()
	if err != nil {
		if staged != nil {
			staged.Discard()
		}
		return ipam.State{}, err
	}
	defer unlock()
	if staged != nil {
		if err := staged.Commit(); err != nil {
			return ipam.State{}, fmt.Errorf("write the pools of the store of leases: %w", err)
		}
	}
	return s.state(Lease{})
}

// State returns what is in use, what cools down, and the pools in addition to those of the configuration.
func (s *Store) State() (ipam.State, error) {
	unlock, err := s.lock()
	if err != nil {
		return ipam.State{}, err
	}
	defer unlock()
	return s.state(Lease{})
}

// saveLast stores a preference only, so its errors are ignored.
func (s *Store) saveLast(last map[string]netip.Addr) {
	if data, err := json.Marshal(last); err == nil {
		_ = os.WriteFile(s.path("last"), data, 0o644)
	}
}

// list is os.ReadDir without a stat and a sort of each.
func list(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("read the store of leases: %w", err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read the store of leases: %w", err)
	}
	return names, nil
}

// Look is State for metrics: it takes no lock, so that readers never delay pods, and removes nothing. Concurrent changes
// may or may not be included.
func (s *Store) Look() (ipam.State, error) {
	state := ipam.State{InUse: map[netip.Addr]bool{}, Cooling: map[netip.Addr]bool{}, Pools: s.pools()}
	var err error
	if state.InUse, err = s.Held(); err != nil {
		return state, err
	}
	names, err := list(s.path(coolingDir))
	if err != nil {
		return state, err
	}
	now := s.now()
	for _, n := range names {
		if a, released, ok := parseCooling(n); ok && now.Since(released) < s.coolDown {
			state.Cooling[a] = true
			delete(state.InUse, a) // it was released since
		}
	}
	return state, nil
}

// Released says when an address was released.
type Released struct {
	Addr netip.Addr
	At   bootclock.Instant
}

// Released lists the released addresses that still rest. It takes no lock.
func (s *Store) Released() ([]Released, error) {
	names, err := list(s.path(coolingDir))
	if err != nil {
		return nil, err
	}
	var all []Released
	for _, n := range names {
		if a, at, ok := parseCooling(n); ok {
			all = append(all, Released{a, at})
		}
	}
	return all, nil
}

// Held returns the addresses that are in use. It takes no lock.
func (s *Store) Held() (map[netip.Addr]bool, error) {
	held := map[netip.Addr]bool{}
	names, err := list(s.path(addressesDir))
	for _, n := range names {
		if a, err := netip.ParseAddr(n); err == nil {
			held[a] = true
		}
	}
	return held, err
}

// Usage returns how full each pool is, as Look does.
func (s *Store) Usage(pools []ipam.Pool) ([]ipam.Usage, error) {
	state, err := s.Look()
	if err != nil {
		return nil, err
	}
	var all []ipam.Usage
	for _, p := range pools {
		for _, f := range inet.Families {
			if len(p.Of(f)) > 0 {
				all = append(all, p.Usage(f, state))
			}
		}
	}
	return all, nil
}
