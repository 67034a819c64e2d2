package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/term"
)

// Stdin stands for standard input in place of a file's name.
const Stdin = "-"

// Input is where Load reads standard input from, and keeps it.
type Input struct {
	// Stdin is read for the name "-".
	Stdin *os.File
	// Dir is a directory with room for what comes from a pipe. Nothing is left in it.
	Dir string
}

// source is a file that can be read from its start repeatedly.
type source struct {
	label string // its name in messages
	name  string // the file's name, or "" if it comes from a pipe
	file  *os.File
	size  int64
}

// open reads the source from its start, decompressed. Several readers may be open at once.
func (s source) open() (io.ReadCloser, error) {
	return unpack(io.NewSectionReader(s.file, 0, s.size))
}

// close closes the file. What came from a pipe is deleted with it.
func (s source) close() { s.file.Close() }

// openSource opens a file, or stores what comes from a pipe: archives are read twice, once to check them before any node is
// touched and once to send them.
func (in Input) openSource(ctx context.Context, file string) (source, error) {
	if file == Stdin {
		if term.IsTerminal(int(in.Stdin.Fd())) {
			return source{}, errors.New("standard input: it is a terminal; pipe an image into it, as with `docker save NAME:TAG | fathom image load -`")
		}
		return in.keep(ctx, in.Stdin, "standard input")
	}
	info, err := os.Stat(file)
	if err != nil {
		return source{}, fmt.Errorf("%s: %w", file, bare(err))
	}
	switch {
	case info.IsDir():
		return source{}, fmt.Errorf("%s: it is a directory; an image comes as a tar file: pack an OCI layout with `tar -C %s -cf image.tar .`", file, file)
	case !info.Mode().IsRegular() && info.Mode().Type() != fs.ModeNamedPipe:
		return source{}, fmt.Errorf("%s: it is neither a regular file nor a pipe; save the image to one", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return source{}, fmt.Errorf("%s: %w", file, bare(err))
	}
	if info.Mode().IsRegular() {
		return source{label: file, name: file, file: f, size: info.Size()}, nil
	}
	defer f.Close()
	return in.keep(ctx, f, file)
}

// bare returns an error of package os without the path, which the caller adds.
func bare(err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// keep stores what comes from a pipe, still compressed, in a file whose name it removes at once: so the kernel frees it
// however this process ends.
func (in Input) keep(ctx context.Context, pipe io.Reader, label string) (source, error) {
	f, err := os.CreateTemp(in.Dir, "image-")
	if err != nil {
		return source{}, fmt.Errorf("%s: keep it in a file until it is checked: %w", label, err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return source{}, fmt.Errorf("%s: keep it in a file without a name: %w", label, err)
	}
	type result struct {
		size int64
		err  error
	}
	done := make(chan result, 1)
	// A blocked read from a pipe cannot be cancelled; then the goroutine and the file are left behind.
	go func() {
		n, err := io.Copy(f, io.LimitReader(pipe, maxArchive+1))
		done <- result{n, err}
	}()
	var r result
	select {
	case <-ctx.Done():
		return source{}, fmt.Errorf("%s: read it: %w", label, ctx.Err())
	case r = <-done:
	}
	switch {
	case r.err != nil:
		err = fmt.Errorf("%s: keep it in %s until it is checked: %w", label, in.Dir, bare(r.err))
	case r.size > maxArchive:
		err = fmt.Errorf("%s: it has more than %d GiB: that is not an image", label, int64(maxArchive)>>30)
	case r.size == 0:
		err = fmt.Errorf("%s: it is empty: the program that should write an image to it wrote nothing", label)
	default:
		return source{label: label, file: f, size: r.size}, nil
	}
	f.Close()
	return source{}, err
}
