package lease

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Rebuild makes leases again that are lost, as people lose them who empty the directory: the store is not the only truth,
// for a pod's device is there as long as the pod. present tells what devices say of their leases. It is called under the
// lock of the store: as a device goes before its lease and comes after it, one that is there then and has no lease has
// lost it. Of what is left of a lease all is kept; an address that is another's by now stays his. Returned are those of
// which something was lost.
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

// StandIn is the attachment of a lease of which nothing is left but the device. The runtime's name of the container is
// nowhere but in the lease; the device's name follows from it, so that who knows the one finds the other.
func StandIn(hostDevice, ifName string) Attachment { return Attachment{"device-" + hostDevice, ifName} }

// IsWhole says whether each address of the lease has its file, be it this lease's or another's.
func (s *Store) IsWhole(l Lease) bool {
	for _, a := range l.Addresses {
		if _, err := os.Lstat(s.address(a)); errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

// remains are all leases that are left under either of their names, by device.
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

// restore makes those files of a lease that are missing, and says whether any was.
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
		// It is damaged, or of one that is gone.
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
