package image

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What comes from a pipe can be read as often as a file, and nothing of it stays.
func TestFromPipes(t *testing.T) {
	data := dockerArchive(t, "nginx:1", testImage(t, "amd64", "text"))
	dir := t.TempDir()
	empty := func() {
		t.Helper()
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("in the directory are %v, %v; want nothing", left, err)
		}
	}
	write := func(w io.WriteCloser, data []byte) {
		_, _ = w.Write(data) // a reader that leaves early is one of the cases
		w.Close()
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, file := range map[string]string{"standard input": Stdin, fifo: fifo} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if file == fifo {
				w.Close()
				if w, err = os.OpenFile(fifo, os.O_WRONLY, 0); err != nil {
					return
				}
			}
			write(w, squeeze(t, formatZstd, data))
		}()
		from, err := Input{Stdin: r, Dir: dir}.openSource(t.Context(), file)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		empty()
		a, err := openArchive(from, "amd64")
		if err != nil || !slices.Equal(a.names, []string{"docker.io/library/nginx:1"}) || a.label != what {
			t.Errorf("%s: %+v, %v", what, a, err)
		}
		one, err := from.open()
		if err != nil {
			t.Fatal(err)
		}
		two, err := from.open()
		if err != nil {
			t.Fatal(err)
		}
		for _, in := range []io.ReadCloser{one, two} {
			got, err := io.ReadAll(in)
			in.Close()
			if err != nil || string(got) != string(data) {
				t.Errorf("%s: read %d bytes of %d, error %v", what, len(got), len(data), err)
			}
		}
		from.close()
	}

	input := func(data []byte) Input {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		go write(w, data)
		return Input{Stdin: r, Dir: dir}
	}
	if _, err := input(nil).openSource(t.Context(), Stdin); err == nil || !strings.Contains(err.Error(), "standard input: it is empty: ") {
		t.Errorf("nothing comes: error %v", err)
	}
	// A layout with only a tag has no name, since standard input has none.
	from, err := input(ociArchive(t, map[string]string{refNameAnnotation: "v3"}, testImage(t, "amd64", "text"))).openSource(t.Context(), Stdin)
	if err != nil {
		t.Fatal(err)
	}
	defer from.close()
	if _, err := openArchive(from, "amd64"); err == nil || !strings.Contains(err.Error(), `only the tag "v3"`) {
		t.Errorf("a layout with only a tag: error %v", err)
	}
	gone := input(data)
	gone.Dir = filepath.Join(dir, "gone")
	if _, err := gone.openSource(t.Context(), Stdin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory to keep it in: error %v", err)
	}
	if _, err := (Input{}).openSource(t.Context(), "/dev/zero"); err == nil || !strings.Contains(err.Error(), "neither a regular file nor a pipe") {
		t.Errorf("a device: error %v", err)
	}
	empty()
}

// Ctrl-C ends the wait for a pipe to which nothing is written.
func TestPipeIsInterrupted(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	dir := t.TempDir()
	done := make(chan error)
	go func() {
		_, err := Input{Stdin: r, Dir: dir}.openSource(ctx, Stdin)
		done <- err
	}()
	if _, err := w.Write([]byte("the beginning")); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want that it was cancelled", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("in the directory are %v, %v; want nothing", left, err)
	}
}
