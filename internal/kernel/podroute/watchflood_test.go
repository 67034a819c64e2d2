package podroute_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podroute"
	"github.com/fathom-network/fathom/internal/testenv"
	"github.com/fathom-network/fathom/internal/testenv/linktest"
)

// More changes at once than a socket holds: who listens must still hear of the last one.
func TestWatchChangesInAFlood(t *testing.T) {
	n := linktest.Namespace(t)
	testenv.Must(t, n.SetBridge(link.Device{Name: "eth0", Alias: "test"}))
	testenv.Must(t, n.SetAddrs("eth0", []netip.Prefix{netip.MustParsePrefix("10.0.0.1/8")}))
	changes, err := n.WatchChanges(t.Context())
	testenv.Must(t, err)
	for round := range 10 {
		plan := podnet.Plan{Node: "n"}
		if round%2 == 0 {
			for i := range 3000 {
				plan.Routes = append(plan.Routes, podnet.Route{To: netip.MustParsePrefix(fmt.Sprintf("11.%d.%d.0/24", i/256, i%256)), Via: netip.MustParseAddr("10.0.0.2"), Device: "eth0"})
			}
		}
		done := make(chan error)
		go func() {
			_, err := podroute.Set(n, plan)
			done <- err
		}()
		for heard := false; !heard; {
			have, err := podroute.Read(n, nil)
			testenv.Must(t, err)
			if len(have.Routes) == len(plan.Routes) {
				break
			}
			select {
			case _, open := <-changes:
				if !open {
					t.Fatal("closed")
				}
			case <-time.After(time.Minute):
				have, _ := podroute.Read(n, nil)
				t.Fatalf("round %d: not heard of the last; %d of %d", round, len(have.Routes), len(plan.Routes))
			}
		}
		testenv.Must(t, <-done)
	}
}
