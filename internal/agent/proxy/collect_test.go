package proxy

import (
	"runtime/debug"
	gauges "runtime/metrics"
	"testing"
)

func gcPercent() int {
	sample := []gauges.Sample{{Name: "/gc/gogc:percent"}}
	gauges.Read(sample)
	return int(sample[0].Value.Uint64())
}

func TestCollectRarely(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	settled := collectRarely()
	beside := collectRarely()
	if got := gcPercent(); got != startPercent {
		t.Errorf("at the start: GOGC is %d, want %d", got, startPercent)
	}
	settled()
	beside()
	settled()
	if got := gcPercent(); got != 100 {
		t.Errorf("settled: GOGC is %d, want what it was, 100", got)
	}
	debug.SetGCPercent(800)
	defer collectRarely()()
	if got := gcPercent(); got != 800 {
		t.Errorf("GOGC is %d, want what the user said, 800", got)
	}
}
