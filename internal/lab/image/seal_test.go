package image

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/testenv"
)

func TestSeal(t *testing.T) {
	at := t.TempDir()
	dir := filepath.Join(at, "root")
	file := filepath.Join(dir, "a", "file")
	whole := []byte("content of a file")
	testenv.Must(t, os.MkdirAll(filepath.Join(dir, "empty"), 0o755))
	testenv.Must(t, os.Mkdir(filepath.Dir(file), 0o755))
	testenv.Must(t, os.WriteFile(file, whole, 0o644))
	testenv.Must(t, os.Symlink("file", filepath.Join(dir, "a", "link")))
	if isWhole(dir, at) {
		t.Error("whole without a seal")
	}
	testenv.Must(t, seal(dir, at))
	check := func(class string, want bool) {
		t.Helper()
		if isWhole(dir, at) != want {
			t.Errorf("%s: whole is %v", class, !want)
		}
	}
	check("nothing done", true)
	for class, data := range testenv.Damages(whole) {
		testenv.Must(t, os.WriteFile(file, data, 0o644))
		check(class, len(data) == len(whole)) // sizes are what is compared
	}
	testenv.Must(t, os.WriteFile(file, whole, 0o644))
	check("as it was", true)
	testenv.Must(t, os.Rename(file, file+"2"))
	check("another name", false)
	testenv.Must(t, os.Rename(file+"2", file))
	testenv.Must(t, os.Remove(filepath.Join(dir, "empty")))
	check("a directory is gone", false)
	testenv.Must(t, os.WriteFile(filepath.Join(dir, "empty"), nil, 0o644))
	check("a file for a directory", false)
	data, err := os.ReadFile(filepath.Join(at, sealFile))
	testenv.Must(t, err)
	for class, data := range testenv.Damages(data) {
		testenv.Must(t, os.WriteFile(filepath.Join(at, sealFile), data, 0o644))
		check("seal "+class, false)
	}
}

// Damaged images and templates are made anew, and it is said.
func TestDamagedImages(t *testing.T) {
	ctx := context.Background()
	k := builtKit(t)
	state := t.TempDir()
	var said []string
	say := func(s string) { said = append(said, s) }
	prepare := func() string {
		t.Helper()
		s, err := Prepare(ctx, k, state, say)
		testenv.Must(t, err)
		testenv.Must(t, s.Close())
		return s.Root()
	}
	root := prepare()
	db := filepath.Join(root, "io.containerd.metadata.v1.bolt", "meta.db")
	whole, err := os.Stat(db)
	testenv.Must(t, err)
	testenv.Must(t, os.Truncate(db, whole.Size()-1))
	said = nil
	if again := prepare(); again != root || !strings.Contains(strings.Join(said, "\n"), "damaged") {
		t.Errorf("%s instead of %s: %q", again, root, said)
	}
	if now, err := os.Stat(db); err != nil || now.Size() == whole.Size()-1 {
		t.Errorf("%v, %v", now, err)
	}
	said = nil
	if prepare(); len(said) > 0 {
		t.Errorf("a whole template: %q", said)
	}
	if left, err := os.ReadDir(filepath.Join(state, "images")); err != nil || len(left) != 2 { // with the lock
		t.Errorf("left are %v, %v", left, err)
	}

	testenv.Must(t, os.WriteFile(filepath.Join(k.ImagesDir(), "index.json"), nil, 0o644))
	if _, err := Prepare(ctx, k, state, nil); err == nil || !strings.Contains(err.Error(), "fathom image build") {
		t.Errorf("with a damaged index: %v", err)
	}
	testenv.Must(t, Build(ctx, k, say))
	if again := prepare(); again != root {
		t.Errorf("%s of the images that were built again, instead of %s", again, root)
	}
}
