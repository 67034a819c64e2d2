package lab

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/saved"
	"github.com/fathom-network/fathom/internal/lab/stored"
)

// keep writes a lab that was saved then, and returns its name.
func keep(t *testing.T, paths Paths, name string, then time.Time, change func(*saved.Header)) string {
	t.Helper()
	l, err := topology.Default(topology.Overrides{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	l.Clusters = l.Clusters[:1]
	l.Underlay4, l.Underlay6 = netip.MustParsePrefix("10.201.0.0/16"), netip.MustParsePrefix("fd00:201::/48")
	h := saved.Header{Lab: *l, Taken: then, Kubernetes: "v1.2.3", Fathom: "v0.1"}
	change(&h)
	path := filepath.Join(saves(paths), name, then.Format(stamp)+extension)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w, err := saved.NewWriter(out, h, map[string]*saved.Cluster{"east": {Planes: map[string]stored.Disk{"east-control-plane": {}}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return name + "@" + then.Format(stamp)
}

func TestFindSaved(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	paths := Paths{State: t.TempDir()}
	as := func(*saved.Header) {}
	old := keep(t, paths, "a", now.Add(-time.Hour), as)
	middle := keep(t, paths, "a", now.Add(-10*time.Minute), as)
	last := keep(t, paths, "a", now.Add(-time.Minute), as)
	other := keep(t, paths, "b", now.Add(-time.Minute), as)
	// What is no whole file, or of another kind, is not there.
	for _, name := range []string{"20260102T030405.000Z.tar.zst", "notes.txt"} {
		if err := os.WriteFile(filepath.Join(saves(paths), "a", name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for what, want := range map[string]string{
		"@": last, "a@": last, "b@": other, "@-0s": last, "@-5m": middle, "a@-30m": old, "@-60m": old, old: old,
		"@" + strings.TrimPrefix(middle, "a@"): middle,
	} {
		if s, err := FindSaved(paths, "a", what, now); err != nil || s.Name != want {
			t.Errorf("%s is %s, want %s: %v", what, s.Name, want, err)
		}
	}
	for _, what := range []string{"@-61m", "c@", "a@2026", "../x@", "x/y@"} {
		if s, err := FindSaved(paths, "a", what, now); !IsNotFound(err) {
			t.Errorf("%s is %s: %v", what, s.Name, err)
		}
	}
	if _, err := FindSaved(paths, "a", "@-soon", now); err == nil || IsNotFound(err) {
		t.Errorf("@-soon: %v", err)
	}
}

// Of those of a row the oldest go, and none that somebody asked for.
func TestPruneSaved(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	paths := Paths{State: t.TempDir()}
	var want []string
	for i := range 6 {
		name := keep(t, paths, "a", now.Add(time.Duration(i)*time.Second), func(h *saved.Header) { h.Periodic = i != 1 })
		if i == 1 || i >= 4 {
			want = append(want, name)
		}
	}
	if err := PruneSaved(paths, "a", 2); err != nil {
		t.Fatal(err)
	}
	all, err := Saves(paths, "")
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, s := range all {
		have = append(have, s.Name)
		if err := RemoveSaved(paths, s); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(have, want) {
		t.Errorf("there are %v, want %v", have, want)
	}
	if left, err := os.ReadDir(paths.State); err == nil && len(left) > 0 {
		t.Errorf("%v is left", left)
	}
}

func TestForkName(t *testing.T) {
	paths := Paths{State: t.TempDir(), Run: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(paths.State, "labs", "test-fork-2"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"test-fork": "test-fork-3", "abcdefghijklmnopqrst": "abcdefghijklmnopqr-2"} {
		if got, err := ForkName(paths, name); err != nil || got != want || !topology.IsName(got) {
			t.Errorf("a fork of %s is %s, want %s: %v", name, got, want, err)
		}
	}
}

// Nodes see nothing of this machine because a file says so.
func TestHostPathsOfFile(t *testing.T) {
	paths := Paths{State: t.TempDir(), Run: t.TempDir()}
	name := keep(t, paths, "a", time.Now().UTC(), func(h *saved.Header) {
		h.Lab.Clusters[0].Nodes[1].Mounts = []topology.Mount{{HostPath: "/root", NodePath: "/mnt"}}
	})
	s, err := FindSaved(paths, "a", name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Restore(t.Context(), paths, s.Path, RestoreOptions{}, nil); err == nil || !strings.Contains(err.Error(), "/root") {
		t.Errorf("the error is %v", err)
	}
}
