package lab

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestDamagedFiles begins `up` on what a power cut leaves of a lab's files.
func TestDamagedFiles(t *testing.T) {
	testenv.NeedRoot(t) // to ask for the host's routes
	l := testLab(t, "damaged")
	l.Underlay4, l.Underlay6 = netip.MustParsePrefix("10.231.0.0/16"), netip.MustParsePrefix("fd00:fa:231::/48")
	testenv.Must(t, l.save())
	want, err := topology.Default(topology.Overrides{Name: l.Name})
	testenv.Must(t, err)
	lose := []byte("lost")
	whole, err := os.ReadFile(l.dir(definition))
	testenv.Must(t, err)
	put := func(path string, data []byte) {
		t.Helper()
		testenv.Must(t, os.RemoveAll(path))
		if string(data) != string(lose) {
			testenv.Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
			testenv.Must(t, os.WriteFile(path, data, 0o600))
		}
	}
	// begin is as in Up, without what needs a kit.
	begin := func() (*Lab, []string, error) {
		l, err := define(l.Paths, want, func(netip.Prefix) bool { return false })
		if err != nil {
			return nil, nil, err
		}
		var steps []string
		testenv.Must(t, l.mend(&timeline{report: func(e Event) { steps = append(steps, e.Step) }}))
		testenv.Must(t, l.save())
		return l, steps, nil
	}
	same := func(class string) {
		t.Helper()
		if have, err := os.ReadFile(l.dir(definition)); err != nil || string(have) != string(whole) {
			t.Errorf("%s: the definition is %s, %v", class, have, err)
		}
	}
	damages := testenv.Damages(whole)
	damages["lost"] = lose

	// Nothing was built: it begins anew.
	for class, data := range damages {
		put(l.dir(definition), data)
		now, steps, err := begin()
		if err != nil || !now.Underlay4.IsValid() || len(steps) == 0 != (class == "lost") {
			t.Errorf("%s, nothing built: %v, %v", class, steps, err)
		}
		if _, err := topology.Decode(read(t, l.dir(definition)), l.Name); err != nil {
			t.Errorf("%s, nothing built: %v", class, err)
		}
	}

	// A cluster was built: the lab is what it was.
	put(l.dir(definition), whole)
	for i := range l.Clusters {
		testenv.Must(t, l.setBuilt(&l.Clusters[i]))
	}
	for class, data := range damages {
		put(l.dir(definition), data)
		put(l.dir(definition)+durable.Damaged, lose)
		if read, err := Open(l.Paths, l.Name); err != nil || read.Underlay4 != l.Underlay4 {
			t.Errorf("%s: %v, %v", class, read, err)
		}
		now, steps, err := begin()
		if err != nil || now.Underlay4 != l.Underlay4 || len(steps) == 0 || !strings.Contains(steps[0], "lab.json") {
			t.Errorf("%s: %v, %v", class, steps, err)
		}
		same(class)
		if class != "lost" && string(read(t, l.dir(definition)+durable.Damaged)) != string(data) {
			t.Errorf("%s: the damaged one is not kept", class)
		}
		if _, steps, err := begin(); err != nil || len(steps) > 0 {
			t.Errorf("%s: it is mended again: %v, %v", class, steps, err)
		}
	}

	// Marks are marks whatever is in them: what is built stays so.
	for class, data := range testenv.Damages(whole) {
		for i := range l.Clusters {
			put(l.dir(marks, l.Clusters[i].Name), data)
			if !l.built(&l.Clusters[i]) {
				t.Errorf("%s: cluster %s is to be made anew", class, l.Clusters[i].Name)
			}
		}
		if _, steps, err := begin(); err != nil || len(steps) > 0 {
			t.Errorf("%s of the marks: %v, %v", class, steps, err)
		}
		same(class)
	}

	// Nothing is left that says what was built: that is for the user to take down.
	put(l.dir(definition), nil)
	if _, _, err := begin(); !IsDamaged(err) || !strings.Contains(err.Error(), "fathom down --name damaged") {
		t.Errorf("with nothing left: %v", err)
	}
}

// A layer of the kit's programs that lost some is made anew, also while nodes have it open.
func TestDamagedLayer(t *testing.T) {
	l := testLab(t, "damaged")
	l.Kit.Dir = t.TempDir()
	for _, path := range []string{filepath.Join(l.Kit.BinDir(), "kubelet"), filepath.Join(l.Kit.CNIDir(), "bridge")} {
		testenv.Must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		testenv.Must(t, os.WriteFile(path, []byte("a program"), 0o755))
	}
	testenv.Must(t, os.Symlink("kubelet", filepath.Join(l.Kit.BinDir(), "link")))
	dir, err := l.kitLayer()
	testenv.Must(t, err)
	program := filepath.Join(dir, "usr/local/bin/kubelet")
	first, err := os.Stat(program)
	testenv.Must(t, err)
	check := func(what string) {
		t.Helper()
		if again, err := l.kitLayer(); err != nil || again != dir || string(read(t, program)) != "a program" {
			t.Errorf("%s: %s, %v, with %q", what, again, err, read(t, program))
		}
		if left, err := os.ReadDir(filepath.Dir(dir)); err != nil || len(left) != 1 {
			t.Errorf("%s: left are %v, %v", what, left, err)
		}
	}
	check("whole")
	if now, err := os.Stat(program); err != nil || !os.SameFile(first, now) {
		t.Error("a whole layer was made anew")
	}
	// In place of the link to the kit's file, as on another file system.
	testenv.Must(t, os.Remove(program))
	check("without a program")
	testenv.Must(t, os.Remove(program))
	testenv.Must(t, os.WriteFile(program, nil, 0o755))
	check("with an empty program")
	testenv.Must(t, os.RemoveAll(filepath.Join(dir, "opt")))
	check("without a directory")
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	testenv.Must(t, err)
	return data
}
