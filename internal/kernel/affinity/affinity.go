// Package affinity binds threads that measure to processors. Where a client and a server run is a factor of two and
// more of what they do in a second, and on an idle machine the scheduler decides it anew again and again.
package affinity

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Bind has the calling goroutine run by a thread of its own, on the nth of the processors that it may run on (counted
// from 0, and around), until release is called by the same goroutine.
func Bind(nth int) (release func(), err error) {
	runtime.LockOSThread()
	var before unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("read on which processors a thread may run: %w", err)
	}
	var one unix.CPUSet
	one.Set(pick(&before, nth))
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("bind a thread to a processor: %w", err)
	}
	return func() {
		_ = unix.SchedSetaffinity(0, &before)
		runtime.UnlockOSThread()
	}, nil
}

// pick is the nth processor of a set, counted around.
func pick(set *unix.CPUSet, nth int) int {
	nth %= set.Count()
	for cpu := 0; ; cpu++ {
		if !set.IsSet(cpu) {
			continue
		}
		if nth == 0 {
			return cpu
		}
		nth--
	}
}
