package ruleset_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/service"
	engine "github.com/fathom-network/fathom/internal/kernel/nft"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/testenv"
)

// What TestServicesAtRandom asks of Linux, of a kernel in memory: each change is one that Linux accepts, and leaves what
// there should be.
func TestServicesInMemory(t *testing.T) {
	kernel := engine.NewFake()
	r, other := ruleset.New(kernel), ruleset.New(kernel)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	now := make([][]service.Frontend, 20)
	set(t, r, plan())
	for step := range 200 {
		var changes []service.Change
		for _, i := range rng.Perm(len(now))[:1+rng.IntN(3)] {
			c := service.Change{Service: service.Name{Namespace: "default", Name: fmt.Sprintf("s%d", i)}, Old: now[i]}
			if rng.IntN(6) > 0 {
				c.New = random(rng, i)
			}
			now[i] = c.New
			changes = append(changes, c)
		}
		p := plan(slices.Concat(now...)...)
		before, err := kernel.Generation()
		testenv.Must(t, err)
		if rng.IntN(8) > 0 {
			err = r.ChangeServices(changes)
		} else {
			p.OwnPods = prefixes([][]string{{"10.244.0.0/24"}, {"10.244.1.0/24", "fd00:10:244:1::/64"}, nil}[rng.IntN(3)]...)
			if _, err = r.SetServices(p); err == nil {
				_, err = r.SetServices(plan(p.Frontends...))
			}
			p = plan(p.Frontends...)
		}
		testenv.Must(t, err)
		if after, err := kernel.Generation(); err != nil || after > before+2 {
			t.Errorf("step %d: %d transactions, %v", step, after-before, err)
		}
		if same, err := r.HoldsServices(t.Context()); !same || err != nil {
			t.Fatalf("step %d: a comparison finds a difference, %v", step, err)
		}
		holds(t, other, p)
		if t.Failed() {
			t.FailNow()
		}
	}
}
