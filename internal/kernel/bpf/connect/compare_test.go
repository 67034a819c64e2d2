package connect_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/fathom-network/fathom/internal/facts/service"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestComparedUnderChange compares while Services change all the time. It must report none of the proxy's own changes, and every
// change of another process.
func TestComparedUnderChange(t *testing.T) {
	b := inside(t)
	if b == nil {
		return
	}
	if same, err := b.Holds(t.Context()); same || err != nil {
		t.Errorf("before anything was set: %v, %v", same, err)
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	const services = 200 // whose endpoints are more than one portion
	b.plan = plan(someOf(r, services)...)
	b.set(t)
	var changes atomic.Int64
	churn := func() (end func()) {
		stop, ended := make(chan struct{}), sync.WaitGroup{}
		ended.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				i := r.IntN(services)
				old, next := b.plan.Frontends[i], someOf(r, services)[i]
				b.plan.Frontends[i] = next
				if err := b.Change([]service.Change{{Service: old.Service, Old: []service.Frontend{old}, New: []service.Frontend{next}}}); err != nil {
					t.Error(err)
					return
				}
				changes.Add(1)
			}
		})
		return func() {
			close(stop)
			ended.Wait()
		}
	}
	end := churn()
	compared := 0
	for ; compared < 100 || changes.Load() < 1000; compared++ {
		before := changes.Load()
		if same, err := b.Holds(t.Context()); !same || err != nil {
			t.Fatalf("comparison %d: %v, %v", compared, same, err)
		}
		for changes.Load() == before && !t.Failed() {
			time.Sleep(time.Millisecond)
		}
	}
	t.Logf("%d comparisons, %d changes", compared, changes.Load())
	end()
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(b.opts.Dir, name), nil)
		testenv.Must(t, err)
		t.Cleanup(func() { m.Close() })
		return m
	}
	first := func(m *ebpf.Map) (key, value []byte) {
		testenv.Must(t, m.NextKey(nil, &key))
		testenv.Must(t, m.Lookup(key, &value))
		return key, value
	}
	for _, name := range []string{pin.Services, pin.Backends} {
		m := open(name)
		for what, tamper := range map[string]func(){
			"one is gone": func() {
				k, _ := first(m)
				testenv.Must(t, m.Delete(k))
			},
			"one is another": func() {
				k, v := first(m)
				v[0]++
				testenv.Must(t, m.Put(k, v))
			},
			"one is too much": func() {
				k, v := first(m)
				k[0]++
				for m.Lookup(k, &v) == nil {
					k[0]++
				}
				testenv.Must(t, m.Put(k, v))
			},
		} {
			tamper()
			if same, err := b.Holds(t.Context()); same || err != nil {
				t.Errorf("%s: %s: a comparison finds nothing, %v", name, what, err)
			}
			_, err := b.Set(b.plan)
			testenv.Must(t, err)
			if same, err := b.Holds(t.Context()); !same || err != nil {
				t.Errorf("%s: %s, and mended: %v, %v", name, what, same, err)
			}
			b.check(t)
		}
	}
	// If the concurrent writer fails, sockets do not see the new frontends.
	old := b.plan
	b.plan = plan(someOf(r, services)...)
	failed := errors.New("failed")
	if _, err := b.SetAfter(b.plan, func() error { return failed }); !errors.Is(err, failed) {
		t.Errorf("the error is %v", err)
	}
	if same, err := b.Holds(t.Context()); same || err != nil {
		t.Errorf("what is not certain is as it should be, %v", err)
	}
	if d, err := b.Check(old); err != nil || len(d) > 0 {
		t.Errorf("sockets meet something else: %v, %v", d, err)
	}
	b.set(t)
	// Another process replaces a frontend's number by one that is not in use. Only what the number refers to is written again.
	m := open(pin.Services)
	k, v := first(m)
	copy(v, []byte{0, 0, 0, 0x70})
	testenv.Must(t, m.Put(k, v))
	b.set(t)
	if same, err := b.Holds(t.Context()); !same || err != nil {
		t.Errorf("a number too high, and mended: %v, %v", same, err)
	}
	// The same, while changes go on.
	end = churn()
	m = open(pin.Backends)
	testenv.Must(t, m.Put([]byte{255, 255, 255, 255, 0, 0, 0, 0}, make([]byte, 20)))
	if same, err := b.Holds(t.Context()); same || err != nil {
		t.Errorf("a comparison while Services change finds nothing, %v", err)
	}
	end()
	testenv.Must(t, os.Remove(filepath.Join(b.opts.Dir, pin.Connect4)))
	b.set(t)
	testenv.Must(t, os.Remove(filepath.Join(b.opts.Dir, pin.Recvmsg6)))
	if same, err := b.Holds(t.Context()); same || err != nil {
		t.Errorf("a program is gone: a comparison finds nothing, %v", err)
	}
}
