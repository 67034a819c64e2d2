// Package bootclock tells time for what is kept in files: by a clock that nobody sets.
//
// The wall clock steps, by an administrator, by NTP after the boot, by a virtual machine that is resumed: what is to rest
// for 30 seconds would rest for an hour or not at all. Go's monotonic reading does not outlive its process, and stands
// still while the machine is suspended. CLOCK_BOOTTIME (clock_gettime(2)) does neither, and is the same for all
// processes, but begins anew with each boot: so it is of use only together with which boot that was.
package bootclock

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An Instant is a moment of one boot of a machine. The zero value is some moment before this boot.
type Instant struct {
	// Boot is the boot's ID, /proc/sys/kernel/random/boot_id.
	Boot string `json:"boot,omitempty"`
	// At is how long after the boot it was, time of suspension included.
	At time.Duration `json:"at,omitempty"`
}

// Since says how long before i the earlier instant was, at least. Of another boot all that is known is that it was before
// this one, so it is at least as long ago as this boot is. That goes as well for one that is later than i: the clock
// does not go back, so that is no value of it.
func (i Instant) Since(earlier Instant) time.Duration {
	if !i.SameBoot(earlier) || earlier.At < 0 || earlier.At > i.At {
		return i.At
	}
	return i.At - earlier.At
}

// SameBoot says whether both are of one boot.
func (i Instant) SameBoot(other Instant) bool { return i.Boot != "" && i.Boot == other.Boot }

// Clock is the clock of this boot.
type Clock struct{ boot string }

// Open returns the clock.
func Open() (Clock, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return Clock{}, fmt.Errorf("ask which boot this is: %w", err)
	}
	return Clock{strings.TrimSpace(string(data))}, nil
}

// Now is this moment.
func (c Clock) Now() Instant {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(fmt.Sprintf("read CLOCK_BOOTTIME, which Linux has since 2.6.39: %v", err))
	}
	return Instant{c.boot, time.Duration(t.Nano())}
}
