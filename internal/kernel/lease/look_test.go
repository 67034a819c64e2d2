package lease

import (
	"net/netip"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestLookTakesNoLock counts while somebody gives out addresses, who may take long, and sees what State sees.
func TestLookTakesNoLock(t *testing.T) {
	s, err := Open(t.TempDir(), time.Minute)
	testenv.Must(t, err)
	prefix := netip.MustParsePrefix("10.244.1.0/29")
	pools := []ipam.Pool{{Name: "default", Ranges: []netip.Prefix{prefix}}}
	acquire := func(id, address string) {
		t.Helper()
		_, err := s.Acquire(Lease{Attachment: Attachment{ContainerID: id, IfName: "eth0"}}, func(ipam.State) (ipam.Choice, error) {
			return ipam.Choice{Addresses: []netip.Addr{netip.MustParseAddr(address)}}, nil
		})
		testenv.Must(t, err)
	}
	acquire("a", "10.244.1.2")
	acquire("b", "10.244.1.3")
	testenv.Must(t, s.Release(Attachment{ContainerID: "a", IfName: "eth0"}))

	unlock, err := s.lock()
	testenv.Must(t, err)
	looked := make(chan ipam.State)
	go func() {
		state, err := s.Look()
		if err != nil {
			t.Error(err)
		}
		looked <- state
	}()
	var state ipam.State
	select {
	case state = <-looked:
	case <-time.After(time.Minute):
		t.Fatal("it waits for who gives out addresses")
	}
	usage, err := s.Usage(pools)
	testenv.Must(t, err)
	unlock()
	want, err := s.State()
	testenv.Must(t, err)
	if len(state.InUse) != len(want.InUse) || len(state.Cooling) != len(want.Cooling) || len(state.InUse) != 1 || len(state.Cooling) != 1 {
		t.Errorf("got %+v, want %+v", state, want)
	}
	if len(usage) != 1 || usage[0].InUse != 1 || usage[0].Cooling != 1 {
		t.Errorf("usage %+v", usage)
	}
}
