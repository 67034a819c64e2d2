package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestSample(t *testing.T) {
	for _, c := range []struct {
		s                sample
		median, min, max float64
		nearest          int
	}{
		{sample{2}, 2, 2, 2, 0},
		{sample{3, 1}, 2, 1, 3, 0},
		{sample{9, 1, 4}, 4, 1, 9, 2},
		{sample{5, 1, 2, 4}, 3, 1, 5, 2},
	} {
		before := append(sample{}, c.s...)
		if c.s.median() != c.median || c.s.min() != c.min || c.s.max() != c.max || c.s.nearest() != c.nearest {
			t.Errorf("%v: median %v, min %v, max %v, nearest %d; want %v, %v, %v, %d", c.s,
				c.s.median(), c.s.min(), c.s.max(), c.s.nearest(), c.median, c.min, c.max, c.nearest)
		}
		for i := range before {
			if before[i] != c.s[i] {
				t.Errorf("the order of %v was changed to %v", before, c.s)
			}
		}
	}
	// Round by round: the ratio of the medians would be 2.
	if got := (sample{2, 9, 4}).per(sample{2, 3, 1}); got.median() != 3 || got.min() != 1 || got.max() != 4 {
		t.Errorf("ratios %v", got)
	}
}

func TestFigureTable(t *testing.T) {
	got := figureTable([]figure{
		{"up", "s", 8, sample{7.004, 6, 9}},
		{"… ratio", "", 3, sample{3.5}},
		{"nothing measured", "s", 0, nil},
		{"memory", "MB", 60, sample{123.4, 3.21, 40}},
	})
	want := `| what    | median  | min    | max    | at most    |
| ------- | ------- | ------ | ------ | ---------- |
| up      | 7.00 s  | 6.00 s | 9.00 s | 8 s        |
| … ratio | 3.50    | 3.50   | 3.50   | 3 (missed) |
| memory  | 40.0 MB | 3.2 MB | 123 MB | 60 MB      |
`
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestTimelineOf(t *testing.T) {
	out := "  0.1s check this machine\n\nstep    begins   takes\nx  0.0s 0.1s |=|\n\nLab x is up\n"
	if got, want := timelineOf(out), "step    begins   takes\nx  0.0s 0.1s |=|"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := timelineOf("nothing"); got != "" {
		t.Errorf("got %q of nothing", got)
	}
}

func TestProc(t *testing.T) {
	const status = "Name:\tkubelet\nPPid:\t12\nRssAnon:\t   38592 kB\n"
	if got := statusField(status, "RssAnon"); got != "38592 kB" {
		t.Errorf("RssAnon %q", got)
	}
	if got := statusField(status, "Rss"); got != "" {
		t.Errorf("a field that is not there is %q", got)
	}
	if got := statSeconds("7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0"); got != 2 {
		t.Errorf("processor time %v, want 2", got)
	}
	mean := memory([]process{{name: "a", anon: 1}, {name: "a", anon: 3}, {name: "b", anon: 5}})
	if mean["a"] != 2 || mean["b"] != 5 {
		t.Errorf("mean memory %v", mean)
	}
	own, err := processes(os.Getpid())
	if err != nil || len(own) == 0 || own[0].anon == 0 {
		t.Errorf("this process is %v, %v", own, err)
	}
}

func TestDiskCountsWhatIsNotShared(t *testing.T) {
	dir := t.TempDir()
	node := filepath.Join(dir, "node")
	if err := os.Mkdir(node, 0o755); err != nil {
		t.Fatal(err)
	}
	empty, err := diskMB(node)
	if err != nil {
		t.Fatal(err)
	}
	shared := filepath.Join(dir, "shared")
	if err := os.WriteFile(shared, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(shared, filepath.Join(node, "link")); err != nil {
		t.Fatal(err)
	}
	if got, err := diskMB(node); err != nil || got != empty {
		t.Errorf("a shared file costs %v MB, %v", got-empty, err)
	}
	f, err := os.Create(filepath.Join(node, "own"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil { // some file systems give blocks only then
		t.Fatal(err)
	}
	if got, err := diskMB(node); err != nil || got-empty < 1 || got-empty > 1.2 {
		t.Errorf("a file of its own of 1 MiB costs %v MB, %v", got-empty, err)
	}
}

func TestManifestOfABareStart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etcd.yaml")
	manifest := "kind: Pod\nspec:\n  containers:\n  - command: [etcd, --data-dir=/var/lib/etcd, --cert-file=/etc/kubernetes/pki/x.crt, \"--a=b\"]\n"
	if err := os.WriteFile(path, []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	command, err := manifestCommand(path)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(inRoot("/tmp/x", command), " ")
	if want := "etcd --data-dir=/tmp/x/var/lib/etcd --cert-file=/tmp/x/etc/kubernetes/pki/x.crt --a=b"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestStepEnd(t *testing.T) {
	out := "step                             begins   takes\ncheck this machine                0.00s   0.01s |= |\neast: start the API server        1.50s   2.25s | == |\neast: 3 nodes Ready              3.80s  10.00s |  ====|\n"
	if got, err := stepEnd(out, "start the API server"); err != nil || got != 3.75 {
		t.Errorf("the API server answers after %v: %v", got, err)
	}
	if got, err := lastEnd(out); err != nil || got != 13.8 {
		t.Errorf("all ends after %v: %v", got, err)
	}
	if _, err := stepEnd(out, "start kubelet"); err == nil {
		t.Error("a step that is not there has an end")
	}
}
