package lease

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/testenv"
)

// TestRebuild: whatever is lost of the leases of devices that are there, the addresses of these are in use afterwards, and
// what was left of a lease is as it was.
func TestRebuild(t *testing.T) {
	of := func(i int, device string, addresses ...string) Lease {
		l := Lease{Attachment: attachment(i), Network: "fathom", PodNamespace: "default", PodName: device, HostDevice: device}
		for _, a := range addresses {
			l.Addresses = append(l.Addresses, netip.MustParseAddr(a))
		}
		return l
	}
	first, second := of(0, "web-0", "10.1.0.2", "fd00::2"), of(1, "web-1", "10.1.0.3", "fd00::3")
	removeAll := func(dirs ...string) func(*testing.T, *Store) {
		return func(t *testing.T, s *Store) {
			for _, d := range dirs {
				names, err := list(s.path(d))
				testenv.Must(t, err)
				for _, n := range names {
					testenv.Must(t, os.Remove(filepath.Join(s.path(d), n)))
				}
			}
		}
	}
	for name, test := range map[string]struct {
		lose    func(*testing.T, *Store)
		rebuilt int
		kept    bool // who is attached is known still
	}{
		"nothing":     {func(*testing.T, *Store) {}, 0, true},
		"everything":  {removeAll(attachmentsDir, addressesDir, coolingDir), 2, false},
		"addresses":   {removeAll(addressesDir), 2, true},
		"attachments": {removeAll(attachmentsDir), 2, true},
		"an address":  {func(t *testing.T, s *Store) { testenv.Must(t, os.Remove(s.address(first.Addresses[1]))) }, 1, true},
		"damage": {func(t *testing.T, s *Store) {
			for _, l := range []Lease{first, second} { // under all names
				testenv.Must(t, os.WriteFile(s.attachment(l.Attachment), []byte("{"), 0o644))
			}
		}, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, time.Minute, nil)
			var devices []Lease
			for _, l := range []Lease{first, second} {
				_, err := s.Acquire(l, choose(l.Addresses...))
				testenv.Must(t, err)
				device := l
				device.Attachment = StandIn(l.HostDevice, "eth0")
				devices = append(devices, device)
			}
			test.lose(t, s)
			present := func() ([]Lease, error) {
				f, err := os.Open(s.path("lock"))
				testenv.Must(t, err)
				defer f.Close()
				if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
					t.Errorf("devices are looked at without the lock of the store: %v", err)
				}
				return devices, nil
			}
			rebuilt, err := s.Rebuild(present)
			if err != nil || len(rebuilt) != test.rebuilt {
				t.Errorf("rebuilt %v, %v", rebuilt, err)
			}
			if rebuilt, err := s.Rebuild(present); err != nil || len(rebuilt) != 0 {
				t.Errorf("once more rebuilt %v, %v", rebuilt, err)
			}
			if _, err := s.Repair(); err != nil {
				t.Error(err)
			}
			state, err := s.State()
			if err != nil || len(state.InUse) != 4 || len(state.Cooling) != 0 {
				t.Errorf("%+v, %v", state, err)
			}
			all, err := s.List()
			testenv.Must(t, err)
			if len(all) != 2 {
				t.Errorf("%d leases: %v", len(all), all)
			}
			for i, l := range []Lease{first, second} {
				want := l.Attachment
				if !test.kept {
					want = devices[i].Attachment
				}
				have, found, err := s.Find(want)
				if err != nil || !found || have.Rebuilt == test.kept || !slices.Equal(have.Addresses, l.Addresses) || !s.OfThisBoot(have) || !s.IsWhole(have) {
					t.Errorf("%s: %+v, %v, %v", want, have, found, err)
				}
				testenv.Must(t, s.Release(want))
			}
			if state, err := s.State(); err != nil || len(state.InUse) != 0 || len(state.Cooling) != 4 {
				t.Errorf("released: %+v, %v", state, err)
			}
		})
	}
}

// TestRebuildOfTakenAddress: what was lost and is another's by now stays his.
func TestRebuildOfTakenAddress(t *testing.T) {
	s := open(t, time.Minute, nil)
	l, err := s.Acquire(Lease{Attachment: attachment(0), HostDevice: "web-0"}, choose())
	testenv.Must(t, err)
	lost := Lease{Attachment: StandIn("web-1", "eth0"), HostDevice: "web-1", Addresses: []netip.Addr{l.Addresses[0], netip.MustParseAddr("fd00::99")}}
	rebuilt, err := s.Rebuild(func() ([]Lease, error) { return []Lease{lost}, nil })
	if err != nil || len(rebuilt) != 1 {
		t.Fatalf("%v, %v", rebuilt, err)
	}
	for a, want := range map[netip.Addr]Attachment{l.Addresses[0]: l.Attachment, lost.Addresses[1]: lost.Attachment} {
		if holder, found, err := s.Holder(a); err != nil || !found || holder.Attachment != want {
			t.Errorf("%s is of %v, %v, %v", a, holder, found, err)
		}
	}
	if err := s.Release(lost.Attachment); err != nil {
		t.Error(err)
	}
	if !s.IsWhole(l) {
		t.Errorf("%s went with another's lease", l.Addresses[0])
	}
}

// TestOpenAgain makes what is missing, but in a mount of a directory that was removed: there nothing can be made.
func TestOpenAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "fathom")
	for _, missing := range []string{"", attachmentsDir, addressesDir, coolingDir} {
		testenv.Must(t, os.RemoveAll(filepath.Join(dir, missing)))
		s, err := Open(dir, 0)
		testenv.Must(t, err)
		if _, err := s.Acquire(Lease{Attachment: attachment(0)}, choose()); err != nil {
			t.Errorf("without %q: %v", missing, err)
		}
		testenv.Must(t, s.Release(attachment(0)))
	}
	testenv.NeedRoot(t)
	mount := t.TempDir()
	testenv.Must(t, syscall.Mount(dir, mount, "", syscall.MS_BIND, ""))
	t.Cleanup(func() { testenv.Must(t, syscall.Unmount(mount, syscall.MNT_DETACH)) })
	if _, err := Open(mount, 0); err != nil {
		t.Error(err)
	}
	testenv.Must(t, os.RemoveAll(dir))
	testenv.Must(t, os.MkdirAll(dir, 0o755)) // as a plugin does
	var removed *RemovedError
	if _, err := Open(mount, 0); !errors.As(err, &removed) || removed.Dir != mount {
		t.Errorf("in a directory that was removed: %v", err)
	}
}
