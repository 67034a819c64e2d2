package bootclock

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
)

func TestSince(t *testing.T) {
	now := Instant{"this", 100 * time.Second}
	for name, test := range map[string]struct {
		earlier Instant
		want    time.Duration
	}{
		"of this boot":               {Instant{"this", 70 * time.Second}, 30 * time.Second},
		"this moment":                {now, 0},
		"of another boot":            {Instant{"other", 99 * time.Second}, 100 * time.Second},
		"of another, longer boot":    {Instant{"other", time.Hour}, 100 * time.Second},
		"of no boot that is known":   {Instant{}, 100 * time.Second},
		"later than now":             {Instant{"this", 101 * time.Second}, 100 * time.Second},
		"before the boot, by damage": {Instant{"this", -time.Second}, 100 * time.Second},
	} {
		if got := now.Since(test.earlier); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
	if (Instant{}).SameBoot(Instant{}) {
		t.Error("two instants of boots that nobody knows are of the same")
	}
}

// What one process writes down another one reads.
func TestClock(t *testing.T) {
	clock, err := Open()
	testenv.Must(t, err)
	first := clock.Now()
	data, err := json.Marshal(first)
	testenv.Must(t, err)
	var read Instant
	testenv.Must(t, json.Unmarshal(data, &read))
	other, err := Open()
	testenv.Must(t, err)
	second := other.Now()
	if read != first || !second.SameBoot(read) || second.At < read.At || second.Since(read) != second.At-first.At {
		t.Errorf("%v, read as %v, and then %v", first, read, second)
	}
}
