package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"sort"
	"strings"
)

// Limits on what is read of an archive, which may come from anywhere.
const (
	maxEntries  = 200_000
	maxName     = 4096     // a file's or a link's: PATH_MAX. In a tar file a name may have a megabyte
	maxNames    = 16 << 20 // all names of an archive
	maxDocument = 4 << 20  // a manifest, an index or a configuration
	maxKept     = 64 << 20 // all documents of an archive
	maxArchive  = 64 << 30 // an archive, unpacked
)

// An archive is a tar file of images that was read through once and found valid.
type archive struct {
	source
	// replacement is sent to nodes in place of the archive's file of that name, if there is one. For an OCI layout it is
	// index.json, with the names in the form that CRI wants, since containerd takes them literally. For other archives it
	// is manifest.json, if part of the archive is not loaded.
	replaced    string
	replacement []byte
	names       []string // full names, sorted
	skipped     []string // other contents, and why they are not loaded
}

// contents is what was found in an archive.
type contents struct {
	entries   int
	top       []string          // the first names, to describe a tar file of something else
	blobs     map[string]blob   // regular files by their clean path
	links     map[string]string // symlinks and hard links, as paths in the archive
	documents map[string][]byte // small files that look like JSON
	kept      int               // size of the documents
	names     int               // size of all names
}

// blob is a regular file of an archive.
type blob struct {
	digest string // sha256:...
	size   int64
	gzip   bool
}

// openArchive reads a source to its end and checks that it holds complete images for this machine, before anything is sent
// to a node. The error says what it found instead.
func openArchive(from source, arch string) (*archive, error) {
	a := &archive{source: from}
	r, err := from.open()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.label, err)
	}
	defer r.Close()
	c, err := readContents(r)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.label, err)
	}
	if err := a.check(c, arch); err != nil {
		return nil, fmt.Errorf("%s: %w", from.label, err)
	}
	return a, nil
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
			return nil, fmt.Errorf("it has more than %d entries: that is not an image", maxEntries)
		}
		for _, name := range []string{header.Name, header.Linkname} {
			if len(name) > maxName {
				return nil, fmt.Errorf("a name in it, %.40s..., has %d bytes, more than %d: that is not an image", name, len(name), maxName)
			}
			c.names += len(name)
		}
		if c.names > maxNames {
			return nil, fmt.Errorf("the names in it have more than %d bytes: that is not an image", maxNames)
		}
		if len(c.top) < 5 {
			c.top = append(c.top, header.Name)
		}
		// A sparse file can claim any size in a few bytes, and no tool writes images that way.
		if header.Typeflag == tar.TypeGNUSparse || slices.ContainsFunc(slices.Collect(maps.Keys(header.PAXRecords)), isSparse) {
			return nil, fmt.Errorf("%s in it is a sparse file: that is not an image", header.Name)
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
	// To the end, so that the checksum at the end of the compressed stream is verified.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, fmt.Errorf("read it to the end: %w", told(err))
	}
	return c, nil
}

func isSparse(record string) bool { return strings.HasPrefix(record, "GNU.sparse.") }

// read reads one regular file.
func (c *contents) read(name string, r io.Reader, size int64) error {
	digest := sha256.New()
	buffered := bufio.NewReaderSize(r, 32<<10)
	head, err := buffered.Peek(2)
	if err != nil && err != io.EOF {
		return err
	}
	zipped := string(head) == "\x1f\x8b" // before the buffer under head is refilled
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
		return fmt.Errorf("%s in it is malformed: %w", name, err)
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

// check finds the images in the contents, and returns the first problem.
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
