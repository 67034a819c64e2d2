package saved

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// A file is a tar archive (POSIX, pax) in a zstd frame (RFC 8878). Its members are, in this order:
//
//	fathom-lab.json            the Header
//	clusters/NAME.json         a Cluster
//	nodes/NAME/PATH            a file of a node's disk, where the node has it
//	images/N.json, images/N.tar  an Image, and what `image load` reads
const (
	headerName  = "fathom-lab.json"
	clustersDir = "clusters/"
	nodesDir    = "nodes/"
	imagesDir   = "images/"
)

// Limits on what is read of a file, which may be anybody's.
const (
	maxDocument = 512 << 20 // a header or a cluster: etcd's own limit is 8 GiB, its default 2
	maxEntries  = 1_000_000
	maxName     = 4096 // PATH_MAX
	maxTotal    = 64 << 30
	maxWindow   = 128 << 20 // of zstd: what a reader has to hold
)

// Writer writes a file.
type Writer struct {
	zip *zstd.Encoder
	tar *tar.Writer
}

// NewWriter begins a file.
func NewWriter(w io.Writer, h Header, clusters map[string]*Cluster) (*Writer, error) {
	zip, err := zstd.NewWriter(w, zstd.WithEncoderCRC(true), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
	if err != nil {
		return nil, err
	}
	out := &Writer{zip, tar.NewWriter(zip)}
	h.Format = format
	if err := out.document(headerName, h); err != nil {
		return nil, err
	}
	for i := range h.Lab.Clusters {
		name := h.Lab.Clusters[i].Name
		if err := out.document(clustersDir+name+".json", clusters[name]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (w *Writer) document(name string, v any) error {
	data, err := json.Marshal(v)
	if err == nil {
		err = w.tar.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(data)), Format: tar.FormatPAX})
	}
	if err == nil {
		_, err = w.tar.Write(data)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// AddImage adds an image, which is the n-th of the file, with the archive of it.
func (w *Writer) AddImage(n int, i Image, archive *os.File) error {
	if err := w.document(fmt.Sprintf("%s%d.json", imagesDir, n), i); err != nil {
		return err
	}
	info, err := archive.Stat()
	if err != nil {
		return err
	}
	if err := w.tar.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s%d.tar", imagesDir, n), Mode: 0o600, Size: info.Size(), Format: tar.FormatPAX}); err != nil {
		return err
	}
	_, err = io.Copy(w.tar, archive)
	return err
}

// Close ends the file. One that was not ended is not read.
func (w *Writer) Close() error { return errors.Join(w.tar.Close(), w.zip.Close()) }

// File is a file that is read.
type File struct {
	Header
	Clusters map[string]*Cluster
	file     *os.File
	zip      *zstd.Decoder
	tar      *tar.Reader
	entries  int
	total    int64
	next     *tar.Header // the first member that has not been read
}

// Open reads what a file says of its lab.
func Open(name string) (*File, error) {
	f, err := open(name)
	if err != nil {
		return nil, err
	}
	for {
		h, err := f.advance()
		if err != nil {
			f.Close()
			return nil, &InvalidError{err}
		}
		if h == nil || !strings.HasPrefix(h.Name, clustersDir) {
			break
		}
		cluster := strings.TrimSuffix(strings.TrimPrefix(h.Name, clustersDir), ".json")
		var c Cluster
		if err := f.document(h, &c); err != nil {
			f.Close()
			return nil, &InvalidError{err}
		}
		f.Clusters[cluster] = &c
	}
	for i := range f.Lab.Clusters {
		c := &f.Lab.Clusters[i]
		if f.Clusters[c.Name] == nil {
			f.Close()
			return nil, &InvalidError{fmt.Errorf("it has nothing of cluster %s", c.Name)}
		}
		for _, n := range c.ControlPlanes() {
			if _, ok := f.Clusters[c.Name].Planes[n.Name]; !ok {
				f.Close()
				return nil, &InvalidError{fmt.Errorf("it has nothing of the control-plane node %s", n.Name)}
			}
		}
	}
	return f, nil
}

// ReadHeader reads the header of a file alone.
func ReadHeader(name string) (Header, error) {
	f, err := open(name)
	if err != nil {
		return Header{}, err
	}
	f.Close()
	return f.Header, nil
}

func open(name string) (*File, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	zip, err := zstd.NewReader(file, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
	if err != nil {
		file.Close()
		return nil, err
	}
	f := &File{Clusters: map[string]*Cluster{}, file: file, zip: zip, tar: tar.NewReader(zip)}
	h, err := f.advance()
	switch {
	case err != nil:
	case h == nil || h.Name != headerName:
		err = errors.New("it does not begin with " + headerName)
	default:
		if err = f.document(h, &f.Header); err == nil {
			err = f.check()
		}
	}
	if err != nil {
		f.Close()
		return nil, &InvalidError{err}
	}
	return f, nil
}

// Close ends the reading.
func (f *File) Close() {
	f.zip.Close()
	f.file.Close()
}

// advance goes to the next member, and returns nil at the end of the file.
func (f *File) advance() (*tar.Header, error) {
	h, err := f.tar.Next()
	if err == io.EOF {
		f.next = nil
		// What follows the archive's end is not for tar; the checksum that follows it is.
		if _, err := io.Copy(io.Discard, io.LimitReader(f.zip, maxDocument)); err != nil {
			return nil, err
		}
		return nil, nil
	}
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("it ends in the middle")
		}
		return nil, err
	}
	f.entries++
	f.total += h.Size
	switch {
	case f.entries > maxEntries || f.total > maxTotal:
		return nil, fmt.Errorf("it has more than %d files or %d bytes", maxEntries, int64(maxTotal))
	case len(h.Name) > maxName || len(h.Linkname) > maxName:
		return nil, errors.New("it has a name that is too long for a file")
	}
	f.next = h
	return h, nil
}

func (f *File) document(h *tar.Header, into any) error {
	if h.Typeflag != tar.TypeReg || h.Size > maxDocument {
		return fmt.Errorf("%s is no file, or too large a one", h.Name)
	}
	data, err := io.ReadAll(io.LimitReader(f.tar, maxDocument))
	if err == nil {
		err = json.Unmarshal(data, into)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", h.Name, err)
	}
	return nil
}

// Loaded is an image that a file has, with the archive that was taken out of it.
type Loaded struct {
	Image
	Archive string
}

// Node is what Unpack has to know of a node: where its disk is, and what moves texts of the node that was saved to those of the new one.
type Node struct {
	Places []Place
	Move   func(string) string
}

// Unpack lays the files of nodes where they belong, and the archives of images into a directory, if it has a name. What is of other nodes is left
// out. It is called once, and reads the file to its end.
func (f *File) Unpack(nodes map[string]Node, imagesTo string) ([]Loaded, error) {
	var images []Loaded
	disks := map[string]*disk{}
	defer func() {
		for _, d := range disks {
			d.close()
		}
	}()
	for h := f.next; h != nil; {
		if err := f.unpack(h, nodes, disks, imagesTo, &images); err != nil {
			return nil, err
		}
		var err error
		if h, err = f.advance(); err != nil {
			return nil, &InvalidError{err}
		}
	}
	for _, i := range images {
		if i.Archive == "" || len(i.Names) == 0 {
			return nil, &InvalidError{errors.New("it has an image without a name or an archive")}
		}
	}
	return images, nil
}

func (f *File) unpack(h *tar.Header, nodes map[string]Node, disks map[string]*disk, imagesTo string, images *[]Loaded) error {
	if rest, ok := strings.CutPrefix(h.Name, nodesDir); ok {
		node, file, _ := strings.Cut(rest, "/")
		if !hasNode(&f.Lab, node) {
			return &InvalidError{fmt.Errorf("it has files of a node %q, and no such node", node)}
		}
		if !fs.ValidPath(strings.TrimSuffix(file, "/")) {
			return &InvalidError{fmt.Errorf("it has a file %q of node %s, which is no path", file, node)}
		}
		n, wanted := nodes[node]
		if !wanted {
			return nil
		}
		d := disks[node]
		if d == nil {
			var err error
			if d, err = newDisk(n.Places, n.Move); err != nil {
				return fmt.Errorf("unpack the disk of node %s: %w", node, err)
			}
			disks[node] = d
		}
		if err := d.put(path.Clean("/"+file), h, f.tar); err != nil {
			return fmt.Errorf("unpack /%s of node %s: %w", file, node, err)
		}
		return nil
	}
	if !strings.HasPrefix(h.Name, imagesDir) {
		return &InvalidError{fmt.Errorf("it has a member %q, which is of no known kind", h.Name)}
	}
	if path.Ext(h.Name) == ".json" {
		var i Image
		if err := f.document(h, &i); err != nil {
			return &InvalidError{err}
		}
		for _, n := range i.Nodes {
			if !hasNode(&f.Lab, n) {
				return &InvalidError{fmt.Errorf("it has an image of a node %q, and no such node", n)}
			}
		}
		*images = append(*images, Loaded{Image: i})
		return nil
	}
	if len(*images) == 0 || (*images)[len(*images)-1].Archive != "" || h.Typeflag != tar.TypeReg {
		return &InvalidError{fmt.Errorf("%s is no archive of an image that it tells of", h.Name)}
	}
	if imagesTo == "" {
		(*images)[len(*images)-1].Archive = h.Name
		return nil
	}
	out, err := os.CreateTemp(imagesTo, "image-")
	if err != nil {
		return err
	}
	_, err = io.Copy(out, f.tar)
	(*images)[len(*images)-1].Archive = out.Name()
	return errors.Join(err, out.Close())
}

// Check reads a file to its end, and returns its header if it is whole.
func Check(name string) (Header, error) {
	f, err := Open(name)
	if err != nil {
		return Header{}, err
	}
	defer f.Close()
	_, err = f.Unpack(nil, "")
	return f.Header, err
}
