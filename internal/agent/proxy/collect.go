package proxy

import (
	"runtime/debug"
	"sync"
	"time"
)

const (
	// startPercent is GOGC until all Services are in the kernel the first time.
	startPercent = 400
	// quiet is how long after that what was taken from the system for it goes back.
	quiet = 5 * time.Second
)

// collectRarely has the process look for garbage a quarter as often as by default, until settled is called. What the API
// server tells of all Services at the beginning is garbage as soon as it is read, while what is kept of it grows: a third
// of the time from the start until 10,000 Services answered went to looking for it. To have it so for good would cost
// memory for good.
func collectRarely() (settled func()) {
	before := debug.SetGCPercent(startPercent)
	if before < 0 || before >= startPercent { // as the program's user wants it, or another proxy of this process
		debug.SetGCPercent(before)
		return func() {}
	}
	return sync.OnceFunc(func() {
		debug.SetGCPercent(before)
		// Not at once: with 50,000 Services it costs a change beside it 20 ms.
		time.AfterFunc(quiet, debug.FreeOSMemory)
	})
}
