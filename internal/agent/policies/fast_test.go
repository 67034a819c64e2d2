package policies

import (
	"errors"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/facts/policy"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/fastpath"
	"github.com/fathom-network/fathom/internal/kernel/nft"
)

// memory is a fast path that is none.
type memory struct {
	before func() // is called before anything changes

	mu      sync.Mutex
	addrs   map[netip.Addr]policy.Address
	on      bool
	sets    int
	fail    error // of Set and Change
	failOff error
	drifted bool
}

func (m *memory) Set(f policy.Facts) (diff.Count, error) {
	m.before()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sets++
	if m.fail != nil {
		return diff.Count{}, m.fail
	}
	m.addrs, m.on, m.drifted = map[netip.Addr]policy.Address{}, true, false
	for a, is := range f.Addrs {
		m.addrs[a] = is
	}
	return diff.Count{}, nil
}

func (m *memory) Change(f policy.Facts) error {
	m.before()
	m.mu.Lock()
	defer m.mu.Unlock()
	for a, is := range f.Addrs {
		m.addrs[a] = is
	}
	return m.fail
}

func (m *memory) Off() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failOff == nil {
		m.on = false
	}
	return m.failOff
}

func (m *memory) Keep(bool) error                              { return nil }
func (m *memory) LeftOut() int                                 { return 0 }
func (m *memory) Check(policy.Facts) ([]bpf.Difference, error) { return nil, nil }
func (m *memory) Flows() ([]fastpath.Flow, error)              { return nil, nil }
func (m *memory) Forget([]fastpath.Flow) error                 { return nil }
func (m *memory) Holds() (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.drifted, nil
}

func (m *memory) is(on bool, addr string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.on == on && (!on || m.addrs[netip.MustParseAddr(addr)].Own)
}

// TestFollowFast: the fast path has what the table has, after it; it judges nobody while it has something else, and whoever asks who is free waits for it.
func TestFollowFast(t *testing.T) {
	closed := filepath.Join(t.TempDir(), "policies")
	synctest.Test(t, func(t *testing.T) {
		kernel := nft.NewFake()
		w := newWorld(t, kernel, closed, nil, pod("a", "here", "10.244.1.2", map[string]string{"app": "a"}), denyAll("deny", map[string]string{"app": "a"}))
		defer w.end()
		early := false
		m := &memory{fail: errors.New("no"), failOff: errors.New("nor that")}
		m.before = func() { // what is in the table by now is what the Model says
			w.mu.Lock()
			facts := w.model.Facts()
			w.mu.Unlock()
			held, err := kernelAddrs(w.kernel)
			for a, is := range facts.Addrs {
				early = early || err != nil || is.Own && !held[a]
			}
		}
		w.SetFastPath(m)
		if _, known := w.Free(); known {
			t.Error("it is known who is free before the fast path follows")
		}
		settle()
		if _, known := w.Free(); known || m.on {
			t.Errorf("what a fast path does that cannot be told is known: %v, %v", known, m.on)
		}
		if _, problem := w.Status(); problem == "" {
			t.Error("nobody is told of a fast path that goes its own ways")
		}
		m.mu.Lock()
		m.failOff = nil
		m.mu.Unlock()
		settle()
		if free, known := w.Free(); !known || len(free) > 0 || !m.is(false, "") {
			t.Errorf("free %v, known %v: isolated pods are the stack's", free, known)
		}
		m.mu.Lock()
		m.fail = nil
		m.mu.Unlock()
		settle()
		if _, known := w.Free(); !known || !m.is(true, "10.244.1.2") {
			t.Errorf("known %v, %v", known, m.addrs)
		}
		sets := m.sets
		if _, err := w.api.CoreV1().Pods("x").Create(t.Context(), pod("b", "here", "10.244.1.3", nil), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if free, _ := w.Free(); !free[netip.MustParseAddr("10.244.1.3")] || !m.is(true, "10.244.1.3") || m.sets != sets {
			t.Errorf("free %v, set %d times, %v", free, m.sets-sets, m.addrs)
		}
		m.mu.Lock()
		m.drifted = true
		m.mu.Unlock()
		time.Sleep(w.Resync)
		settle()
		if m.sets == sets {
			t.Error("what somebody else changed stays")
		}
		if early {
			t.Error("the fast path knew of something before the table did")
		}
	})
}

// kernelAddrs are the addresses of own pods in the table.
func kernelAddrs(kernel *nft.Fake) (map[netip.Addr]bool, error) {
	all := map[netip.Addr]bool{}
	err := kernel.Each("fathom-policy", &nft.Set{Name: "judged4"}, func(e nft.Element) {
		if a, ok := netip.AddrFromSlice([]byte(e.Key)); ok {
			all[a] = true
		}
	})
	return all, err
}
