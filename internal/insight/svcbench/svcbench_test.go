package svcbench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/testenv"
)

const part = "part-of-a-measurement"

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == part {
		if err := Part(context.Background(), os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// TestRun measures a little of everything. What comes out is not looked at, only that it comes out, and that nothing
// stays.
func TestRun(t *testing.T) {
	testenv.NeedRoot(t)
	kit := "../../../bin/kit"
	for name, kitDir := range map[string]string{"with a kit": kit, "without a kit": ""} {
		t.Run(name, func(t *testing.T) {
			if kitDir != "" {
				if testing.Short() {
					t.Skip("starts an API server")
				}
				testenv.NeedFile(t, filepath.Join(kit, "bin/kube-apiserver"), "`make kit` builds it")
			}
			t.Setenv("TMPDIR", t.TempDir())
			o := Options{Sizes: []Size{{2, 1}, {5, 3}}, Proxies: Proxies, PeersUpTo: 2, Rounds: 1, Changes: 2, Patience: time.Minute,
				Load: 50 * time.Millisecond, Part: []string{"/proc/self/exe", part}, KitDir: kitDir}
			var progress strings.Builder
			report, err := Run(t.Context(), o, &progress)
			if err != nil {
				t.Fatalf("%v\n%s", err, progress.String())
			}
			if len(report.Results) != len(o.Sizes)*len(Proxies) || len(report.Rows()) != len(report.Results) || len(report.Notes()) == 0 {
				t.Fatalf("%d results: %+v", len(report.Results), report)
			}
			for _, r := range report.Results {
				if isPeer(r.Proxy) && (r.Services > o.PeersUpTo || kitDir == "") {
					if r.Note == "" || r.Start != 0 {
						t.Errorf("%s was not to be measured with %d Services: %+v", r.Proxy, r.Services, r)
					}
					continue
				}
				if r.CRR.Median <= 0 || r.RR.Median <= 0 || r.Bare.Median <= 0 || r.Start <= 0 || r.Program <= 0 || r.Changes != o.Changes || r.Memory <= 0 || r.Note != "" {
					t.Errorf("%+v\n%s", r, progress.String())
				}
			}
			if left, err := os.ReadDir(os.Getenv("TMPDIR")); err != nil || len(left) > 0 {
				t.Errorf("left: %v %v", left, err)
			}
		})
	}
}

func TestParseSizes(t *testing.T) {
	got, err := ParseSizes([]string{"10", "1000x5"})
	if want := []Size{{10, 10}, {1000, 5}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	for _, bad := range []string{"", "x", "10x", "1x10", "10x0", "10x1000", "500000x100", "ten"} {
		if _, err := ParseSizes([]string{bad}); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestRatio(t *testing.T) {
	if got, want := ratio([]float64{5, 1, 4, 2, 3}), (Ratio{3, 2, 4}); got != want {
		t.Errorf("%v, want %v", got, want)
	}
	if got := ratio(nil); got != (Ratio{}) {
		t.Errorf("of nothing: %v", got)
	}
}

func TestMissed(t *testing.T) {
	good := Result{Size: Size{10_000, 10}, Proxy: Connect, CRR: Ratio{Median: 0.96}, Start: 1, Program: 0.5, P99: 9, Memory: 100}
	slow := good
	slow.Proxy, slow.CRR.Median, slow.P99 = NFTables, 0.5, 11
	peer := slow
	peer.Proxy = KubeProxyNFTables
	missed := Report{Results: []Result{good, slow, peer}}.Missed()
	if len(missed) != 2 || !strings.Contains(missed[0], "CRR") || !strings.Contains(missed[1], "p99") {
		t.Errorf("%q", missed)
	}
}
