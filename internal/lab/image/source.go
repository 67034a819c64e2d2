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

// Stdin names standard input in the place of a file.
const Stdin = "-"

// Input is where Load reads what has no file of its own.
type Input struct {
	// Stdin is what the name "-" stands for.
	Stdin *os.File
	// Dir is a directory with room for what comes from a pipe. Nothing stays in it.
	Dir string
}

// source is a file that can be read from its beginning as often as need be.
type source struct {
	label string // what it is called in messages
	name  string // the file's, or "" if it comes from a pipe and has none
	file  *os.File
	size  int64
}

// open reads the source anew, without its compression. Several may be read at once.
func (s source) open() (io.ReadCloser, error) {
	return unpack(io.NewSectionReader(s.file, 0, s.size))
}

// close gives up the file. What came from a pipe is gone then.
func (s source) close() { s.file.Close() }

// openSource opens a file, or takes in what comes from a pipe: archives are read twice, to check them before any node
// is touched and to send them.
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

// bare is an error of the os package without the path, which the caller tells.
func bare(err error) error {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err
	}
	return err
}

// keep takes in what comes from a pipe, compressed as it is, into a file that has no name any more: however this process
// ends, the kernel frees it then.
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
	// A read from a pipe that nobody writes to cannot be ended; it is left behind then, and so is the file.
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
		err = fmt.Errorf("%s: it has more than %d GiB: that is no image", label, int64(maxArchive)>>30)
	case r.size == 0:
		err = fmt.Errorf("%s: it is empty: what was to write an image to it wrote nothing", label)
	default:
		return source{label: label, file: f, size: r.size}, nil
	}
	f.Close()
	return source{}, err
}
