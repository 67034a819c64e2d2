package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"sort"
	"strings"
	"unicode/utf8"
)

// Bounds on what is read of an archive that somebody gives us.
const (
	maxEntries  = 200_000
	maxName     = 4096     // a file's or a link's: PATH_MAX. In a tar file a name may have a megabyte
	maxNames    = 16 << 20 // all names of an archive
	maxDocument = 4 << 20  // a manifest, an index or a configuration
	maxKept     = 64 << 20 // all documents of an archive
	maxArchive  = 64 << 30 // an archive, unpacked
)

// format is what a file is, as far as its first bytes tell.
type format string

// The formats we can tell apart; only the first two are archives of images.
const (
	formatTar   format = "a tar archive"
	formatGzip  format = "gzip-compressed"
	formatZstd  format = "zstd-compressed"
	formatXz    format = "xz-compressed"
	formatBzip2 format = "bzip2-compressed"
	formatZip   format = "a zip archive"
	formatELF   format = "a program"
	formatHTML  format = "a web page"
	formatJSON  format = "a JSON document"
	formatText  format = "text"
	formatEmpty format = "empty"
	formatOther format = "of no format that is known here"
)

// headLen is how much of a file detect wants to see: a tar header.
const headLen = 512

// detect tells a file's format by its first bytes.
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

// isOldTar reports whether a block is a tar header of the time before ustar: only its checksum tells.
func isOldTar(block []byte) bool {
	if block[0] == 0 {
		// Two blocks of zeros end an archive, so this may be an empty one; it is no image either way.
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

// An archive is a tar file of images that was read once and found good.
type archive struct {
	path string
	// replacement is what nodes get for the file of the archive that is called so, if there is one: of an OCI layout
	// index.json, with the names as CRI wants them, since containerd takes them as they stand, and of others
	// manifest.json, if something in it is not loaded.
	replaced    string
	replacement []byte
	names       []string // full names, sorted
	skipped     []string // what else is in it, and why it is not loaded
}

// contents is what a reading of an archive found.
type contents struct {
	entries   int
	top       []string          // first names, to tell what a tar of something else is
	blobs     map[string]blob   // regular files by their clean path
	links     map[string]string // symlinks and hard links, as paths in the archive
	documents map[string][]byte // small files that begin like JSON
	kept      int               // size of the documents
	names     int               // size of all names
}

// blob is a regular file of an archive.
type blob struct {
	digest string // sha256:...
	size   int64
	gzip   bool
}

// openArchive reads a file through and checks that it holds whole images for this machine, so that
// nothing is sent to any node before. The error says what it found instead.
func openArchive(file, arch string) (*archive, error) {
	a := &archive{path: file}
	r, err := a.open()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	defer r.Close()
	c, err := readContents(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if err := a.check(c, arch); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return a, nil
}

// readCloser is a decompressed file.
type readCloser struct {
	io.Reader
	io.Closer
}

// open opens the file and takes the compression off.
func (a *archive) open() (io.ReadCloser, error) {
	info, err := os.Stat(a.path)
	if err != nil {
		var pathErr *os.PathError
		if errors.As(err, &pathErr) {
			err = pathErr.Err // the caller names the file
		}
		return nil, err
	}
	switch {
	case info.IsDir():
		return nil, fmt.Errorf("it is a directory; an image comes as a tar file: pack an OCI layout with `tar -C %s -cf image.tar .`", a.path)
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file; save the image to one, because it is read once for each node")
	}
	f, err := os.Open(a.path)
	if err != nil {
		return nil, err
	}
	r, err := decompress(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return readCloser{r, f}, nil
}

// decompress returns the tar stream in r, or says what r is instead.
func decompress(r io.Reader) (io.Reader, error) {
	buffered := bufio.NewReaderSize(r, 1<<18)
	head, err := buffered.Peek(headLen)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch f := detect(head); f {
	case formatTar:
		return io.LimitReader(buffered, maxArchive), nil
	case formatGzip:
		unzipped, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, fmt.Errorf("it begins like a gzip file, but is none: %w", told(err))
		}
		inner := bufio.NewReaderSize(unzipped, 1<<18)
		head, err := inner.Peek(headLen)
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("decompress it: %w", told(err))
		}
		if f := detect(head); f != formatTar {
			return nil, fmt.Errorf("it is compressed with gzip, and what is inside is %s, not a tar archive with an image", f)
		}
		return io.LimitReader(inner, maxArchive), nil
	case formatZstd, formatXz, formatBzip2:
		return nil, fmt.Errorf("it is %s; only gzip is understood here: decompress it first", f)
	case formatEmpty:
		return nil, errors.New("it is empty")
	default:
		return nil, fmt.Errorf("it is %s, not an image; save one with `docker save -o image.tar NAME:TAG` or as an OCI layout in a tar file", f)
	}
}

// told puts the usual errors of a damaged file into words.
func told(err error) error {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return errors.New("it is cut short: the end is missing; copy or save it again")
	case errors.Is(err, gzip.ErrChecksum), errors.Is(err, gzip.ErrHeader), errors.Is(err, tar.ErrHeader):
		return fmt.Errorf("it is damaged (%w); copy or save it again", err)
	}
	return err
}

// readContents reads a tar stream to its end.
func readContents(r io.Reader) (*contents, error) {
	c := &contents{blobs: map[string]blob{}, links: map[string]string{}, documents: map[string][]byte{}}
	tr := tar.NewReader(r)
	for {
		header, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read it after %d entries: %w", c.entries, told(err))
		}
		if c.entries++; c.entries > maxEntries {
			return nil, fmt.Errorf("it has more than %d entries: that is no image", maxEntries)
		}
		for _, name := range []string{header.Name, header.Linkname} {
			if len(name) > maxName {
				return nil, fmt.Errorf("%.40s... in it has a name of %d bytes, where %d is the most: that is no image", name, len(name), maxName)
			}
			c.names += len(name)
		}
		if c.names > maxNames {
			return nil, fmt.Errorf("the names in it have more than %d bytes: that is no image", maxNames)
		}
		if len(c.top) < 5 {
			c.top = append(c.top, header.Name)
		}
		// A sparse file can claim any size in a few bytes, and no tool writes images so.
		if header.Typeflag == tar.TypeGNUSparse || slices.ContainsFunc(slices.Collect(maps.Keys(header.PAXRecords)), isSparse) {
			return nil, fmt.Errorf("%s in it is a sparse file: that is no image", header.Name)
		}
		name := path.Clean(header.Name)
		switch header.Typeflag {
		case tar.TypeReg:
			if err := c.read(name, tr, header.Size); err != nil {
				return nil, fmt.Errorf("read %s in it: %w", header.Name, told(err))
			}
		case tar.TypeSymlink:
			c.links[name] = path.Join(path.Dir(name), header.Linkname)
		case tar.TypeLink:
			c.links[name] = path.Clean(header.Linkname)
		}
	}
	// The rest, so that a checksum at the end of the compression is checked.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, fmt.Errorf("read it to the end: %w", told(err))
	}
	return c, nil
}

func isSparse(record string) bool { return strings.HasPrefix(record, "GNU.sparse.") }

// read takes in one regular file.
func (c *contents) read(name string, r io.Reader, size int64) error {
	digest := sha256.New()
	buffered := bufio.NewReaderSize(r, 32<<10)
	head, err := buffered.Peek(2)
	if err != nil && err != io.EOF {
		return err
	}
	zipped := string(head) == "\x1f\x8b" // before the buffer under head is filled anew
	var document *bytes.Buffer
	var w io.Writer = digest
	if size <= maxDocument && len(head) > 0 && (head[0] == '{' || head[0] == '[') && c.kept+int(size) <= maxKept {
		document = &bytes.Buffer{}
		w = io.MultiWriter(digest, document)
	}
	n, err := io.Copy(w, buffered)
	if err != nil {
		return err
	}
	if n != size {
		return io.ErrUnexpectedEOF
	}
	if document != nil {
		c.documents[name] = document.Bytes()
		c.kept += document.Len()
	}
	c.blobs[name] = blob{digest: "sha256:" + hex.EncodeToString(digest.Sum(nil)), size: size, gzip: zipped}
	return nil
}

// document decodes a JSON file of the archive.
func (c *contents) document(name string, into any) error {
	text, ok := c.documents[c.resolve(name)]
	if !ok {
		if _, ok := c.blobs[c.resolve(name)]; ok {
			return fmt.Errorf("%s in it is not JSON, or larger than %d bytes", name, maxDocument)
		}
		return fmt.Errorf("%s is missing in it: it was cut short, or not saved whole", name)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s in it is not as it should be: %w", name, err)
	}
	return nil
}

// resolve follows the links that older versions of docker save used for layers that occur twice.
func (c *contents) resolve(name string) string {
	name = path.Clean(name)
	for range 8 {
		target, ok := c.links[name]
		if !ok {
			break
		}
		name = target
	}
	return name
}

// check finds the images in what was read, and reports the first thing that is wrong.
func (a *archive) check(c *contents, arch string) error {
	var err error
	switch {
	case c.blobs["oci-layout"].size > 0:
		err = a.checkLayout(c, arch)
	case c.blobs["manifest.json"].size > 0:
		err = a.checkDocker(c, arch)
	case c.entries == 0:
		return errors.New("it is a tar archive with nothing in it")
	default:
		return fmt.Errorf("it is a tar archive, but not of an image: there is neither oci-layout nor manifest.json, but %s; `docker save` makes an image archive, `docker export` does not",
			strings.Join(c.top, ", "))
	}
	sort.Strings(a.names)
	return err
}
