// Package lease keeps, in a directory, which pod has which address of this node: one file an address, so that the
// file system itself refuses to give one twice.
//
//	addresses/10.244.1.7       the lease that has the address, as JSON; the name is the address
//	attachments/ID@eth0        the same file under the name of the container and its interface
//	cooling/10.244.1.5@MILLIS@BOOT  a released address, and when it was released, by the clock of which boot
//	last                       where the search of each pool ended
//	pools                      the node's blocks of address pools, which the agent writes
//	lock                       held by whoever changes something
//
// A program may be killed between any two steps: an attachment is written before its addresses and goes after
// them, so that whatever is there is found by its attachment.
//
// Leases are not synced to the disk. No pod outlives the power, so after a power cut every lease is void, whether it is
// there, damaged or lost; an fsync would cost each ADD more than all else that it writes. The pools are synced: to a node
// that fell back to older ones, a range would count as its own that another node may have taken since.
//
// Ages go by the boot's clock, which nobody sets: package bootclock. What is of another boot is as old as this one, at least.
package lease

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/bootclock"
)

// Attachment is a container's interface: what the runtime attaches to a network, and detaches.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

func (a Attachment) String() string { return a.ContainerID + " " + a.IfName }

// Lease says which pod has addresses.
type Lease struct {
	Attachment
	Network      string       `json:"network"`
	PodNamespace string       `json:"podNamespace,omitempty"`
	PodName      string       `json:"podName,omitempty"`
	PodUID       string       `json:"podUID,omitempty"`
	Netns        string       `json:"netns"`
	HostDevice   string       `json:"hostDevice"`
	Pool         string       `json:"pool"`
	Addresses    []netip.Addr `json:"addresses"`
	// HostPorts are the ports of the node that lead to the pod, empty if there are none; nil if unknown, as in leases that
	// were rebuilt or that an older version made.
	HostPorts []HostPort `json:"hostPorts,omitzero"`
	// Time is by the wall clock, for people. Made is the same moment for computations: Store.Age.
	Time time.Time         `json:"time"`
	Made bootclock.Instant `json:"made,omitzero"`
	// Rebuilt says that the lease was lost and restored from the pod's device. Then Time is when that happened, ContainerID
	// may be a stand-in, and Alias, which no other lease has, is the device's.
	Rebuilt bool   `json:"rebuilt,omitempty"`
	Alias   string `json:"alias,omitempty"`
}

// HostPort is a port of the node that leads to a port of a pod. The plugin "portmap" implements it.
type HostPort struct {
	Protocol  string     `json:"protocol"`      // as CNI has it: tcp, udp or sctp
	Addr      netip.Addr `json:"addr,omitzero"` // of the node's; all of them if it is not valid or unspecified
	Port      uint16     `json:"port"`
	Container uint16     `json:"container"` // the pod's
}

// SamePod reports whether both are leases of pods with the same name. A pod without a name equals no other.
func (l Lease) SamePod(other Lease) bool {
	return l.PodName != "" && l.PodName == other.PodName && l.PodNamespace == other.PodNamespace
}

// Leases is what a plugin needs of a store.
type Leases interface {
	// Acquire creates the lease, with the addresses and the pool that choose picks. An address that the lease requests, and
	// that a pod of the same name had last, does not count as cooling.
	Acquire(l Lease, choose func(ipam.State) (ipam.Choice, error)) (Lease, error)
	// Find returns the lease of an attachment, or false.
	Find(a Attachment) (Lease, bool, error)
	// List returns all leases.
	List() ([]Lease, error)
	// Release removes the lease of an attachment; its addresses start to cool down. A lease that does not exist is not an
	// error.
	Release(a Attachment) error
}

// ExistsError says that the attachment already has a lease.
type ExistsError struct{ Lease Lease }

func (e *ExistsError) Error() string {
	return fmt.Sprintf("%s of container %s is attached already, with %s since %s; DEL comes before another ADD",
		e.Lease.IfName, e.Lease.ContainerID, e.Lease.Addresses, e.Lease.Time.Format(time.RFC3339))
}

// Store is Leases in a directory.
type Store struct {
	dir      string
	coolDown time.Duration
	now      func() bootclock.Instant // tests have their own
}

var _ Leases = (*Store)(nil)

// Open opens the store in a directory, and creates missing parts. If the directory is a mount of a removed one, in which
// nothing can be created, the error is RemovedError.
func Open(dir string, coolDown time.Duration) (*Store, error) {
	clock, err := bootclock.Open()
	if err != nil {
		return nil, fmt.Errorf("open the store of leases: %w", err)
	}
	s := &Store{dir: dir, coolDown: coolDown, now: clock.Now}
	for _, d := range []string{attachmentsDir, coolingDir, addressesDir} {
		if _, err := os.Stat(s.path(d)); err == nil {
			continue
		}
		err := os.MkdirAll(s.path(d), 0o755)
		if _, there := os.Stat(dir); there == nil && errors.Is(err, fs.ErrNotExist) {
			return nil, &RemovedError{dir}
		}
		if err != nil {
			return nil, fmt.Errorf("make the store of leases: %w", err)
		}
	}
	return s, nil
}

// RemovedError says that the directory of the store was removed, and only exists as a mount.
type RemovedError struct{ Dir string }

func (e *RemovedError) Error() string {
	return fmt.Sprintf("the directory of leases %s was removed from the node: who has it mounted has to be started anew", e.Dir)
}

// Acquire implements Leases.
func (s *Store) Acquire(l Lease, choose func(ipam.State) (ipam.Choice, error)) (Lease, error) {
	unlock, err := s.lock()
	if err != nil {
		return Lease{}, err
	}
	defer unlock()
	switch there, err := read(s.attachment(l.Attachment)); {
	case err == nil:
		return Lease{}, &ExistsError{there}
	case isDamaged(err): // by a power cut, which has ended that attachment
		if err := s.release(l.Attachment); err != nil {
			return Lease{}, err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Lease{}, fmt.Errorf("look for an older lease: %w", err)
	}
	state, err := s.state(l)
	if err != nil {
		return Lease{}, err
	}
	choice, err := choose(state)
	if err != nil {
		return Lease{}, err
	}
	early := slices.Concat(state.Yield, l.Addresses) // those that may be given while they cool down
	l.Pool, l.Addresses, l.Made = choice.Pool, choice.Addresses, s.now()
	l.Time = time.Now().UTC().Round(0) // local time would read a file more
	err = s.write(l)
	for _, a := range l.Addresses {
		if err == nil && slices.Contains(early, a) {
			err = s.warm(a)
		}
	}
	if err != nil {
		// Nothing may stay half-done; files that cannot be removed are found by their attachment.
		return Lease{}, errors.Join(err, s.release(l.Attachment))
	}
	for k, v := range choice.Last {
		state.Last[k] = v
	}
	s.saveLast(state.Last)
	return l, nil
}

// write creates the files of the lease. Linking fails if a name exists, whatever State said.
func (s *Store) write(l Lease) error {
	staged, err := s.stage(l)
	if err != nil {
		return err
	}
	defer os.Remove(staged)
	if err := os.Link(staged, s.attachment(l.Attachment)); err != nil {
		return fmt.Errorf("write the lease of %s: %w", l.Attachment, err)
	}
	for _, a := range l.Addresses {
		if err := os.Link(staged, s.address(a)); err != nil {
			return fmt.Errorf("take address %s: %w", a, err)
		}
	}
	return nil
}

// stage writes the lease to a temporary file, which is then linked to its names.
func (s *Store) stage(l Lease) (path string, err error) {
	data, err := json.Marshal(l)
	if err != nil {
		return "", err
	}
	path = s.path("new") // under the lock there is one at a time; what a killed program left is overwritten
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("write a lease: %w", err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return "", fmt.Errorf("write a lease: %w", err)
	}
	return path, nil
}

// Age is the minimal age of a lease: one of another boot is as old as this boot.
func (s *Store) Age(l Lease) time.Duration { return s.now().Since(l.Made) }

// OfThisBoot reports whether the pod of a lease may still exist.
func (s *Store) OfThisBoot(l Lease) bool { return s.now().SameBoot(l.Made) }

// Find implements Leases.
func (s *Store) Find(a Attachment) (Lease, bool, error) {
	return find(s.attachment(a), a)
}

// find reads a lease by one of its names, an attachment's or an address's. A damaged one counts as absent.
func find(path string, of fmt.Stringer) (Lease, bool, error) {
	l, err := read(path)
	switch {
	case err == nil:
		return l, true, nil
	case errors.Is(err, fs.ErrNotExist) || isDamaged(err):
		return Lease{}, false, nil
	default:
		return Lease{}, false, fmt.Errorf("read the lease of %s: %w", of, err)
	}
}

// List implements Leases. It skips damaged ones.
func (s *Store) List() ([]Lease, error) {
	entries, err := os.ReadDir(s.path(attachmentsDir))
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	var all []Lease
	for _, e := range entries {
		l, err := read(filepath.Join(s.path(attachmentsDir), e.Name()))
		switch {
		case err == nil:
			all = append(all, l)
		case !errors.Is(err, fs.ErrNotExist) && !isDamaged(err): // gone since the directory was read
			return nil, fmt.Errorf("list leases: %w", err)
		}
	}
	return all, nil
}

// Release implements Leases.
func (s *Store) Release(a Attachment) error {
	if _, err := os.Lstat(s.attachment(a)); errors.Is(err, fs.ErrNotExist) {
		return nil // the usual second DEL, without waiting for a lock
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return s.release(a)
}

func (s *Store) release(a Attachment) error {
	l, err := read(s.attachment(a))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case isDamaged(err):
		if err := remove(s.attachment(a)); err != nil {
			return err
		}
		return s.repair()
	case err != nil:
		return fmt.Errorf("read the lease of %s: %w", a, err)
	}
	for _, address := range l.Addresses {
		holder, err := read(s.address(address))
		switch {
		case err == nil && holder.Attachment == a:
			err = s.cool(address)
		case errors.Is(err, fs.ErrNotExist):
			// The file was removed by hand, or a program was killed before it had created it or after it had released the
			// address: to rest once more does no harm.
			err = s.coolLost(a, address)
		default: // by now it is another's
			err = nil
		}
		if err != nil {
			return err
		}
	}
	return remove(s.attachment(a))
}

// Holder returns the lease that has the address, or false.
func (s *Store) Holder(address netip.Addr) (Lease, bool, error) {
	return find(s.address(address), address)
}

// ReleaseAddress removes the lease that has the address, including its other address.
func (s *Store) ReleaseAddress(address netip.Addr) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	l, err := read(s.address(address))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil && !isDamaged(err):
		return fmt.Errorf("read the lease of %s: %w", address, err)
	case err == nil:
		if err := s.release(l.Attachment); err != nil {
			return err
		}
	}
	return s.repair()
}

// Repair releases addresses without an attachment, which a power cut or a person left. It returns the names of damaged
// leases, which it removes. Their contents are not kept: they were of pods that are gone.
func (s *Store) Repair() (damaged []string, err error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(s.path(attachmentsDir))
	if err != nil {
		return nil, fmt.Errorf("repair the store of leases: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.path(attachmentsDir), e.Name())
		if _, err := read(path); isDamaged(err) {
			if err := remove(path); err != nil {
				return damaged, err
			}
			damaged = append(damaged, e.Name())
		}
	}
	return damaged, s.repair()
}

func (s *Store) repair() error {
	entries, err := os.ReadDir(s.path(addressesDir))
	if err != nil {
		return fmt.Errorf("repair the store of leases: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(s.path(addressesDir), e.Name())
		address, err := netip.ParseAddr(e.Name())
		if err != nil {
			continue // no file of ours
		}
		l, err := read(path)
		if err == nil {
			if _, err = read(s.attachment(l.Attachment)); err == nil {
				continue
			}
		}
		if !errors.Is(err, fs.ErrNotExist) && !isDamaged(err) {
			return fmt.Errorf("repair the store of leases: %w", err)
		}
		if err := s.cool(address); err != nil {
			return err
		}
	}
	return nil
}

// lock waits for the lock. The kernel releases it when the process ends, however it ends.
func (s *Store) lock() (unlock func(), err error) {
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock the store of leases: %w", err)
	}
	for {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock the store of leases: %w", err)
	}
	return func() { f.Close() }, nil
}
