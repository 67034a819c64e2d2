package image

import (
	"context"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// slowly writes to a file as a busy disk does.
type slowly struct{ file *os.File }

func (s slowly) Write(p []byte) (int, error) {
	time.Sleep(10 * time.Millisecond)
	return s.file.Write(p)
}

// An archive has all of the image, however slowly it is taken.
func TestExport(t *testing.T) {
	ctx := context.Background()
	k := realKit(t)
	node := Target{Name: "one", SocketPath: start(t, k, t.TempDir(), "").socket()}
	var random [1 << 18]byte // more than pipes and streams hold
	for i := range random {
		random[i] = byte('a' + i*i%23)
	}
	before := filepath.Join(t.TempDir(), "before.tar")
	if err := os.WriteFile(before, dockerArchive(t, "app:1", testImage(t, runtime.GOARCH, string(random[:]))), 0o644); err != nil {
		t.Fatal(err)
	}
	names, _, err := Load(ctx, k, []string{before}, Input{Dir: t.TempDir()}, []Target{node})
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.Create(filepath.Join(t.TempDir(), "after.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if err := Export(ctx, k, node, names, slowly{after}); err != nil {
		t.Fatal(err)
	}
	if _, err := openFile(t, after.Name(), runtime.GOARCH); err != nil {
		t.Error(err)
	}
}
