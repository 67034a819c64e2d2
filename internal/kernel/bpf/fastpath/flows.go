package fastpath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/conntrack"
)

// flowKey and flowValue are the key and value of the map Flows: the two ends of a connection, in order.
type flowKey struct {
	Low, High         pin.Key
	LowPort, HighPort [2]byte
}

type flowValue struct{ Verdict, Ending, FromHigher uint32 }

// Flow is a TCP connection that the fast path has judged.
type Flow struct {
	conntrack.Tuple // as the client began it
	// Stale says that the maps have changed since it was judged. Refused says that they do not allow it any more, or that they do not have what
	// its pods' policies say: its packets are dropped.
	Stale, Refused bool
	// Ended says that it has ended, and its packets take the stack.
	Ended bool
	key   flowKey
}

// Flows returns the connections that were judged, also those that have ended and of which nobody has taken the place.
func (p *Policies) Flows() (list []Flow, err error) {
	var judge judgeValue
	if err := p.maps.FathomJudge.Lookup(uint32(0), &judge); err != nil {
		return nil, fmt.Errorf("read the map %s: %w", pin.Judge, err)
	}
	now, err := flowTime()
	if err != nil {
		return nil, err
	}
	var at ebpf.MapBatchCursor
	keys, values := make([]flowKey, 4096), make([]flowValue, 4096)
	for {
		n, err := p.maps.FathomFlows.BatchLookup(&at, keys, values, nil)
		for i := range n {
			f := flowOf(keys[i], values[i])
			f.Stale = values[i].Verdict>>1 != judge.Generation&(1<<31-1)
			f.Ended = values[i].Ending != 0 && now-values[i].Ending > ended
			list = append(list, f)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // that was the last of them
			return list, nil
		}
		if err != nil {
			return list, fmt.Errorf("read the map %s: %w", pin.Flows, err)
		}
	}
}

// Forget has the fast path know nothing of connections: their next packet takes the stack.
func (p *Policies) Forget(list []Flow) error {
	for _, f := range list {
		if err := bpf.IgnoreMissing(p.maps.FathomFlows.Delete(f.key)); err != nil {
			return fmt.Errorf("delete from the map %s: %w", pin.Flows, err)
		}
	}
	return nil
}

func flowOf(k flowKey, v flowValue) Flow {
	low := netip.AddrPortFrom(k.Low.Addr(), binary.BigEndian.Uint16(k.LowPort[:]))
	high := netip.AddrPortFrom(k.High.Addr(), binary.BigEndian.Uint16(k.HighPort[:]))
	if v.FromHigher != 0 {
		low, high = high, low
	}
	return Flow{Tuple: conntrack.Tuple{Source: low, Destination: high}, Refused: v.Verdict&1 != 0, key: k}
}

// ended is ENDED of policies.h.
const ended = 112

// flowTime is the time as flows have it: a clock of the kernel's, in units of 2^30 ns.
func flowTime() (uint32, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &t); err != nil {
		return 0, fmt.Errorf("read the clock of flows: %w", err)
	}
	return uint32(t.Nano()>>30) + 1, nil
}
