package lease

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Rebuild restores lost leases; people lose them by emptying the directory. The store is not the only truth: a pod's device
// exists as long as the pod. present returns what devices say about their leases. It is called under the lock of the store:
// a device is deleted before its lease and created after it, so one that exists then without a lease has lost it.
// Everything that is left of a lease is kept; an address that another pod has by now stays with that pod. Rebuild returns
// the leases that had lost something.
func (s *Store) Rebuild(present func() ([]Lease, error)) ([]Lease, error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	devices, err := present()
	if err != nil {
		return nil, err
	}
	known, err := s.remains()
	if err != nil {
		return nil, err
	}
	var rebuilt []Lease
	for _, l := range devices {
		if left, found := known[l.HostDevice]; found {
			l = left
		} else {
			l.Rebuilt, l.Made, l.Time = true, s.now(), time.Now().UTC().Round(0)
		}
		lost, err := s.restore(l)
		if err != nil {
			return rebuilt, err
		}
		if lost {
			rebuilt = append(rebuilt, l)
		}
	}
	return rebuilt, nil
}

// StandIn is the attachment of a lease of which only the device is left. The runtime's name of the container is only in the
// lease; the device's name is derived from it, so a caller that knows the container finds the lease by the device.
func StandIn(hostDevice, ifName string) Attachment { return Attachment{"device-" + hostDevice, ifName} }

// IsWhole reports whether each address of the lease has a file, this lease's or another's.
func (s *Store) IsWhole(l Lease) bool {
	for _, a := range l.Addresses {
		if _, err := os.Lstat(s.address(a)); errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

// remains returns all leases that are left under either of their names, by device.
func (s *Store) remains() (map[string]Lease, error) {
	all := map[string]Lease{}
	for _, dir := range []string{addressesDir, attachmentsDir} { // attachments last: they are what counts
		names, err := list(s.path(dir))
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			l, err := read(filepath.Join(s.path(dir), name))
			switch {
			case err == nil:
				all[l.HostDevice] = l
			case !errors.Is(err, fs.ErrNotExist) && !isDamaged(err):
				return nil, fmt.Errorf("read the leases that are left: %w", err)
			}
		}
	}
	return all, nil
}

// restore creates the missing files of a lease, and reports whether there were any.
func (s *Store) restore(l Lease) (lost bool, err error) {
	paths := []string{s.attachment(l.Attachment)}
	for _, a := range l.Addresses {
		paths = append(paths, s.address(a))
	}
	var missing []string
	for _, path := range paths {
		holder, err := read(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, path)
			continue
		case err != nil && !isDamaged(err):
			return false, fmt.Errorf("rebuild the lease of %s: %w", l.Attachment, err)
		case err == nil && holder.Attachment == l.Attachment:
			continue
		case err == nil:
			if _, err := os.Lstat(s.attachment(holder.Attachment)); err == nil {
				continue // the address is another's
			}
		}
		// It is damaged, or its pod is gone.
		if err := remove(path); err != nil {
			return false, err
		}
		missing = append(missing, path)
	}
	if len(missing) == 0 {
		return false, nil
	}
	staged, err := s.stage(l)
	if err != nil {
		return false, err
	}
	defer os.Remove(staged)
	for _, path := range missing {
		if err := os.Link(staged, path); err != nil {
			return false, fmt.Errorf("rebuild the lease of %s: %w", l.Attachment, err)
		}
	}
	return true, nil
}
