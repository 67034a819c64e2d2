package agent

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/testenv"
)

// The plugin is written where there is none or another one, in one step, and left alone where it is the same.
func TestInstallProgram(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "opt/cni/bin")
	program, path := filepath.Join(t.TempDir(), "plugin"), filepath.Join(dir, conflist.Plugin)
	long := bytes.Repeat([]byte("0123456789"), 20_000) // more than is compared at a time
	other := bytes.Clone(long)
	other[len(other)-1]++
	installed := func(want []byte) os.FileInfo {
		t.Helper()
		testenv.Must(t, os.WriteFile(program, want, 0o600))
		testenv.Must(t, installProgram(program, dir))
		have, err := os.ReadFile(path)
		testenv.Must(t, err)
		if !bytes.Equal(have, want) {
			t.Errorf("%d bytes are installed that are not the %d of the program", len(have), len(want))
		}
		info, err := os.Stat(path)
		testenv.Must(t, err)
		if info.Mode() != 0o755 {
			t.Errorf("mode %v", info.Mode())
		}
		return info
	}
	var last os.FileInfo
	for _, content := range [][]byte{long, other, long[:len(long)-1], nil, long} {
		now := installed(content)
		if last != nil && os.SameFile(last, now) {
			t.Error("the file was written in place: who runs it would have been disturbed")
		}
		last = installed(content)
		if !os.SameFile(last, now) {
			t.Error("the same program was written again")
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := installProgram(filepath.Join(dir, "none"), dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a program: %v", err)
	}
}
