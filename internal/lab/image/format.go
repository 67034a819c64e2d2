package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the window of a compressed file in bytes, since the decompressor keeps the whole window in memory. It is
// the default limit of the zstd program; xz -9 uses half of it.
const maxWindow = 128 << 20

// format is what a file is, judged by its first bytes.
type format string

// The formats that detect distinguishes; archives of images are of the first five.
const (
	formatTar   format = "a tar archive"
	formatGzip  format = "compressed with gzip"
	formatZstd  format = "compressed with zstd"
	formatXz    format = "compressed with xz"
	formatBzip2 format = "compressed with bzip2"
	formatZip   format = "a zip archive"
	formatELF   format = "a program"
	formatHTML  format = "a web page"
	formatJSON  format = "a JSON document"
	formatText  format = "text"
	formatEmpty format = "empty"
	formatOther format = "of an unknown format"
)

// headLen is how many bytes detect needs: a tar header.
const headLen = 512

// detect determines a file's format from its first bytes.
func detect(head []byte) format {
	for _, magic := range []struct {
		at     int
		bytes  string
		format format
	}{
		{0, "\x1f\x8b", formatGzip},
		{0, "\x28\xb5\x2f\xfd", formatZstd},
		{0, "\xfd7zXZ\x00", formatXz},
		{0, "BZh", formatBzip2},
		{0, "PK\x03\x04", formatZip},
		{0, "\x7fELF", formatELF},
		{257, "ustar", formatTar},
	} {
		if len(head) >= magic.at+len(magic.bytes) && string(head[magic.at:magic.at+len(magic.bytes)]) == magic.bytes {
			return magic.format
		}
	}
	if len(head) == 0 {
		return formatEmpty
	}
	// A skippable frame, with which the output of pzstd begins, for instance.
	if len(head) >= 4 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18" {
		return formatZstd
	}
	if len(head) >= headLen && isOldTar(head[:headLen]) {
		return formatTar
	}
	text := bytes.TrimLeft(head, " \t\r\n")
	switch {
	case len(text) > 0 && (text[0] == '{' || text[0] == '['):
		return formatJSON
	case bytes.HasPrefix(bytes.ToLower(text), []byte("<!doctype html")), bytes.HasPrefix(bytes.ToLower(text), []byte("<html")):
		return formatHTML
	case isText(head):
		return formatText
	}
	return formatOther
}

// isOldTar reports whether a block is a pre-POSIX tar header, which only the checksum identifies.
func isOldTar(block []byte) bool {
	if block[0] == 0 {
		// Two blocks of zeros end an archive, so this may be an empty one; either way it is not an image.
		return false
	}
	want := 0
	digits := strings.Trim(string(block[148:156]), " \x00")
	if digits == "" {
		return false
	}
	for _, digit := range digits {
		if digit < '0' || digit > '7' {
			return false
		}
		want = want*8 + int(digit-'0')
	}
	sum := 0
	for i, b := range block {
		if i >= 148 && i < 156 {
			b = ' '
		}
		sum += int(b)
	}
	return sum == want
}

func isText(head []byte) bool {
	if len(head) > 8 {
		head = head[:len(head)-3] // the last character may be cut
	}
	return utf8.Valid(head) && !bytes.ContainsRune(head, 0)
}

// unpack returns the tar stream in r, or an error that says what r is instead. Closing it frees the decompressor, and
// leaves r open.
func unpack(r io.Reader) (io.ReadCloser, error) {
	buffered := bufio.NewReaderSize(r, 1<<18)
	head, err := buffered.Peek(headLen)
	if err != nil && err != io.EOF {
		return nil, err
	}
	f := detect(head)
	switch f {
	case formatTar:
		return io.NopCloser(io.LimitReader(buffered, maxArchive)), nil
	case formatGzip, formatZstd, formatXz, formatBzip2:
	case formatEmpty:
		return nil, errors.New("it is empty")
	default:
		return nil, fmt.Errorf("it is %s, not an image; save one with `docker save -o image.tar NAME:TAG` or as an OCI layout in a tar file", f)
	}
	out, err := decompress(f, buffered)
	if err != nil {
		return nil, fmt.Errorf("it begins like %s, but is not: %w", f, told(err))
	}
	inner := bufio.NewReaderSize(out, 1<<18)
	if head, err = inner.Peek(headLen); err != nil && err != io.EOF {
		out.Close()
		return nil, fmt.Errorf("cannot decompress it: %w", told(err))
	}
	if inside := detect(head); inside != formatTar {
		out.Close()
		return nil, fmt.Errorf("it is %s, and what is inside is %s, not a tar archive with an image", f, inside)
	}
	return readCloser{io.LimitReader(inner, maxArchive), out}, nil
}

// readCloser combines a reader with another one's Close.
type readCloser struct {
	io.Reader
	io.Closer
}

// decompress removes one of the compressions. Its memory is bounded, whatever r contains.
func decompress(f format, r *bufio.Reader) (io.ReadCloser, error) {
	var in io.Reader
	var err error
	switch f {
	case formatGzip:
		in, err = gzip.NewReader(r)
	case formatZstd:
		var d *zstd.Decoder
		d, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err == nil {
			return readCloser{compressed{f, d}, d.IOReadCloser()}, nil
		}
	case formatXz:
		in, err = newXzReader(r, maxWindow)
	case formatBzip2:
		in = bzip2.NewReader(r)
	}
	if err != nil {
		return nil, decompressError{f, err}
	}
	return io.NopCloser(compressed{f, in}), nil
}

// compressed marks the errors of a decompressor as decompressError.
type compressed struct {
	format format
	r      io.Reader
}

func (c compressed) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && err != io.EOF {
		err = decompressError{c.format, err}
	}
	return n, err
}

// decompressError is why a compressed file cannot be unpacked: it is truncated or damaged, or its window is too large.
type decompressError struct {
	format format
	err    error
}

func (e decompressError) Error() string { return fmt.Sprintf("%s: %v", e.format, e.err) }
func (e decompressError) Unwrap() error { return e.err }

// told explains the usual errors of a damaged file.
func told(err error) error {
	var packed decompressError
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return errors.New("it is cut short: the end is missing; copy or save it again")
	case errors.Is(err, errWindow), errors.Is(err, zstd.ErrWindowSizeExceeded):
		return fmt.Errorf("it was compressed with a window of more than %d MiB, which would have to be held in memory; compress it with less, as with %q or %q", maxWindow>>20, "zstd -19", "xz -9")
	case errors.As(err, &packed), errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("it is damaged (%w); copy or save it again", err)
	}
	return err
}
