package ruleset_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// TestServicesComparedUnderChange compares while Services change all the time: none of the changes is a difference, and
// what somebody else does is.
func TestServicesComparedUnderChange(t *testing.T) {
	n, r := space(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const number = 250 // more than one message of the kernel's has room for
	now := make([][]service.Frontend, number)
	var all []service.Frontend
	for i := range now {
		now[i] = random(rng, i)
		all = append(all, now[i]...)
	}
	set(t, r, plan(all...))
	var changes atomic.Int64
	stop, ended := make(chan struct{}), sync.WaitGroup{}
	churn := func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			i := rng.IntN(number / 2)
			next := random(rng, i)
			if rng.IntN(5) == 0 {
				next = nil
			}
			if err := r.ChangeServices([]service.Change{{Service: service.Name{Namespace: "default", Name: fmt.Sprintf("s%d", i)}, Old: now[i], New: next}}); err != nil {
				t.Error(err)
				return
			}
			now[i] = next
			changes.Add(1)
		}
	}
	ended.Go(churn)
	compared := 0
	for ; compared < 20 || changes.Load() < 300; compared++ {
		before := changes.Load()
		if same, err := r.HoldsServices(t.Context()); !same || err != nil {
			t.Fatalf("comparison %d: %v, %v", compared, same, err)
		}
		for changes.Load() == before && !t.Failed() { // one in each at least
			time.Sleep(time.Millisecond)
		}
	}
	t.Logf("%d comparisons, %d changes", compared, changes.Load())
	for _, tampering := range []string{
		"add element inet T endpoints4 { 192.0.2.1 . tcp . 80 . 0 : 10.0.0.1 . 80 }",
		"add element inet T nodeport_addrs4 { 192.0.2.77 }",
		"add rule inet T output accept",
	} {
		nft(t, n, strings.Fields(strings.ReplaceAll(tampering, " T", " "+ruleset.ServicesTable))...)
		if same, err := r.HoldsServices(t.Context()); same || err != nil {
			t.Errorf("%s: a comparison finds nothing, %v", tampering, err)
		}
		close(stop)
		ended.Wait()
		var all []service.Frontend
		for _, list := range now {
			all = append(all, list...)
		}
		set(t, r, plan(all...))
		if same, err := r.HoldsServices(t.Context()); !same || err != nil {
			t.Errorf("after %s: %v, %v", tampering, same, err)
		}
		stop = make(chan struct{})
		ended.Go(churn)
	}
	close(stop)
	ended.Wait()
}
