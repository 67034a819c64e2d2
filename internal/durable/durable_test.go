package durable

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/testenv"
)

func content(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	}
	testenv.Must(t, err)
	return string(data)
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "b", "state.json")
	for _, want := range []string{"one", "", "three"} {
		testenv.Must(t, WriteFile(path, []byte(want), 0o640))
		if got := content(t, path); got != want {
			t.Errorf("%q is in it, want %q", got, want)
		}
		if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
			t.Errorf("%v, %v", info, err)
		}
	}
	// What goes wrong leaves the old file, and nothing beside it.
	broken := errors.New("broken")
	if err := Write(path, io.MultiReader(strings.NewReader("half"), iotest.ErrReader(broken)), 0o640); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	staged, err := Stage(path, strings.NewReader("four"), 0o640)
	testenv.Must(t, err)
	if got := content(t, path); got != "three" {
		t.Errorf("%q is in it before Commit", got)
	}
	staged.Discard()
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := WriteFile(filepath.Join(path, "below", "a file"), nil, 0o640); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}

// What a writer that was killed left goes with the next writer. That of one at work stays.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	left, other := filepath.Join(dir, ".state.json.new-123"), filepath.Join(dir, ".other.json.new-123")
	for _, p := range []string{left, other} {
		testenv.Must(t, os.WriteFile(p, []byte("ha"), 0o600))
	}
	first, err := Stage(path, strings.NewReader("first"), 0o600)
	testenv.Must(t, err)
	testenv.Must(t, WriteFile(path, []byte("second"), 0o600))
	if content(t, left) != "(none)" || content(t, other) != "ha" {
		t.Errorf("of a killed writer: %q; of another file's: %q", content(t, left), content(t, other))
	}
	testenv.Must(t, first.Commit())
	if got := content(t, path); got != "first" {
		t.Errorf("%q is in it", got)
	}
}

func TestSetAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	for range 2 {
		testenv.Must(t, os.WriteFile(path, []byte("garbage"), 0o600))
		aside, err := SetAside(path)
		testenv.Must(t, err)
		if aside != path+".damaged" || content(t, aside) != "garbage" || content(t, path) != "(none)" {
			t.Errorf("moved to %s: %q, and %q is left", aside, content(t, aside), content(t, path))
		}
	}
	if _, err := SetAside(path); err != nil {
		t.Errorf("without a file: %v", err)
	}
}

// A disk is copied at a moment, as a power cut leaves it: with what ext4 has sent to it by then, and no more.
func TestPowerCut(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedFile(t, "/dev/loop-control", "load the module loop")
	testenv.NeedFile(t, "/usr/sbin/mkfs.ext4", "install e2fsprogs")
	disk := filepath.Join(t.TempDir(), "disk")
	testenv.Must(t, os.WriteFile(disk, nil, 0o600))
	testenv.Must(t, os.Truncate(disk, 16<<20))
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	mount := func(disk string) (dir string, unmount func()) {
		t.Helper()
		dir = t.TempDir()
		// ext4 would send what it has every 5 seconds.
		run("mount", "-o", "loop,commit=3600", disk, dir)
		mounted := true
		unmount = func() {
			if mounted {
				mounted = false
				run("umount", dir)
			}
		}
		t.Cleanup(unmount)
		return dir, unmount
	}
	run("/usr/sbin/mkfs.ext4", "-q", disk)
	dir, _ := mount(disk)
	afterCut := func(check func(dir string)) {
		t.Helper()
		data, err := os.ReadFile(disk)
		testenv.Must(t, err)
		after := filepath.Join(t.TempDir(), "after")
		testenv.Must(t, os.WriteFile(after, data, 0o600))
		dir, unmount := mount(after)
		check(dir)
		unmount()
	}
	expect := func(dir, name, want string) {
		t.Helper()
		if got := content(t, filepath.Join(dir, name)); got != want {
			t.Errorf("after the power cut %q is in %s, want %q", got, name, want)
		}
	}
	testenv.Must(t, WriteFile(filepath.Join(dir, "state"), []byte("old"), 0o600))
	testenv.Must(t, WriteFile(filepath.Join(dir, "new", "directory", "state"), []byte("there"), 0o600))
	testenv.Must(t, os.WriteFile(filepath.Join(dir, "never synced"), []byte("lost"), 0o600))
	afterCut(func(dir string) {
		expect(dir, "state", "old")
		expect(dir, "new/directory/state", "there")
	})
	testenv.Must(t, WriteFile(filepath.Join(dir, "state"), []byte("new"), 0o600))
	staged, err := Stage(filepath.Join(dir, "state"), strings.NewReader("not yet"), 0o600)
	testenv.Must(t, err)
	afterCut(func(dir string) { expect(dir, "state", "new") })
	testenv.Must(t, staged.Commit())
	afterCut(func(dir string) { expect(dir, "state", "not yet") })
	_, err = SetAside(filepath.Join(dir, "state"))
	testenv.Must(t, err)
	testenv.Must(t, os.WriteFile(filepath.Join(dir, "of a tree"), []byte("whole"), 0o600))
	afterCut(func(dir string) {
		expect(dir, "state", "(none)")
		expect(dir, "state.damaged", "not yet")
		if content(t, filepath.Join(dir, "of a tree")) == "whole" {
			t.Error("what nobody synced is on the disk: this test shows nothing")
		}
	})
	testenv.Must(t, SyncAll(dir))
	afterCut(func(dir string) { expect(dir, "of a tree", "whole") })
}
