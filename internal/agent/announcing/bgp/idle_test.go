package bgp_test

import (
	"log/slog"
	"net/netip"
	"runtime"
	"testing"

	"github.com/fathom-network/fathom/internal/agent/announcing/bgp"
	"github.com/fathom-network/fathom/internal/facts/bgpconf"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestNothingRunsWithoutPeers counts goroutines: an agent of a cluster without BGP pays nothing for it.
func TestNothingRunsWithoutPeers(t *testing.T) {
	before := runtime.NumGoroutine()
	s := bgp.New(bgp.Options{Log: slog.New(slog.DiscardHandler), Changed: func() {}})
	s.Set(t.Context(), bgpconf.Speaker{})
	if now := runtime.NumGoroutine(); now != before {
		t.Errorf("%d goroutines run, %d before", now, before)
	}
	for range 3 {
		// It is gone before it dials for the first time.
		if done := s.Set(t.Context(), bgpconf.Speaker{RouterID: netip.MustParseAddr("192.0.2.1"), Peers: []bgpconf.Peer{peer("192.0.2.2", route("192.0.2.0/24"))}}); done.PeersAdded != 1 {
			t.Errorf("a peer more is %+v", done)
		}
		s.Set(t.Context(), bgpconf.Speaker{})
	}
	s.Leave()
	testenv.Eventually(t, "what ran for a peer has ended", func() (bool, string) {
		stacks := make([]byte, 1<<16)
		return runtime.NumGoroutine() <= before, string(stacks[:runtime.Stack(stacks, true)])
	})
}
