package proxy

import (
	"runtime/debug"
	"sync"
	"time"
)

const (
	// startPercent is GOGC until the kernel holds all Services for the first time.
	startPercent = 400
	// quiet is how long after that the process returns the memory it needed for it to the system.
	quiet = 5 * time.Second
)

// collectRarely makes the garbage collector run a quarter as often as by default, until settled is called. At the start,
// the API server's answers are garbage as soon as they are read, while the model grows: garbage collection took a third of
// the time from the start until 10,000 Services answered. Rejected: the setting for good, which would cost memory for good.
func collectRarely() (settled func()) {
	before := debug.SetGCPercent(startPercent)
	if before < 0 || before >= startPercent { // set by the program's user, or by another proxy of this process
		debug.SetGCPercent(before)
		return func() {}
	}
	return sync.OnceFunc(func() {
		debug.SetGCPercent(before)
		// Not at once: at 50,000 Services it delays a concurrent change by 20 ms.
		time.AfterFunc(quiet, debug.FreeOSMemory)
	})
}
