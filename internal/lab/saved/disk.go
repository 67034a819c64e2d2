package saved

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/lab/stored"
)

// Place says where the host has a part of a node's disk: the node's /var, or the upper directory of one of its overlays.
type Place struct {
	Node string // the path on the node: / or /var
	Host string
}

// What overlayfs keeps in an upper directory for what is not there any more. https://docs.kernel.org/filesystems/overlayfs.html
const (
	opaque      = "trusted.overlay.opaque"
	xattrRecord = "SCHILY.xattr."
)

// kept are the extended attributes that are saved: those of directories that hide what is below them, and of programs with capabilities.
var kept = []string{opaque, "security.capability"}

// maxText is how large a file may be of which it is looked at whether it has a key or an address in it.
const maxText = 1 << 20

// AddDisk adds the files of a node's disk. leave says which are not saved, by their paths on the node; what is below a directory that is
// left is left, too. Without secrets it is an error if a file has a key or a token in it, as far as one can tell.
func (w *Writer) AddDisk(node string, places []Place, secrets bool, leave func(path string, read func() []byte) bool) error {
	var keys []string
	for _, p := range places {
		err := filepath.WalkDir(p.Host, func(host string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // removed since
			}
			if err != nil {
				return err
			}
			rest, err := filepath.Rel(p.Host, host)
			if err != nil {
				return err
			}
			at := path.Join(p.Node, filepath.ToSlash(rest))
			if at == p.Node {
				return nil
			}
			read := func() []byte {
				if info, err := e.Info(); err != nil || !info.Mode().IsRegular() || info.Size() > maxText {
					return nil
				}
				data, err := os.ReadFile(host)
				if err != nil {
					return nil
				}
				return data
			}
			if slices.ContainsFunc(places, func(other Place) bool { return other != p && at == other.Node }) || leave(at, read) {
				if e.IsDir() {
					return filepath.SkipDir
				}
				return nil
			}
			if !secrets && stored.HoldsKey(read()) {
				keys = append(keys, at)
				return nil
			}
			if err := w.file(nodesDir+node+at, host); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("save %s of node %s: %w", at, node, err)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if len(keys) > 0 {
		return &NotSavedError{keys, "a file of node " + node + " has a key or a token in it: save it --with-secrets, or take it out"}
	}
	return nil
}

// file adds a file of the host. Sockets, pipes and devices are no part of a disk.
func (w *Writer) file(name, host string) error {
	info, err := os.Lstat(host)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return err
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: info.ModTime(), Format: tar.FormatPAX, PAXRecords: map[string]string{}}
	var content io.Reader
	switch kind := info.Mode().Type(); {
	case kind == 0:
		f, err := os.Open(host)
		if err != nil {
			return err
		}
		defer f.Close()
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
		// A file that becomes shorter while it is read ends in zeros, and one that grows is as it was.
		content = io.LimitReader(io.MultiReader(f, zeros{}), info.Size())
	case kind == fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, name+"/"
	case kind == fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = os.Readlink(host); err != nil {
			return err
		}
	case info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0: // what overlayfs has for a file that was removed
		h.Typeflag = tar.TypeChar
	default:
		return nil
	}
	for _, name := range kept {
		buf := make([]byte, 256)
		if n, err := unix.Lgetxattr(host, name, buf); err == nil {
			h.PAXRecords[xattrRecord+name] = string(buf[:n])
		}
	}
	if err := w.tar.WriteHeader(h); err != nil {
		return err
	}
	if content != nil {
		_, err = io.Copy(w.tar, content)
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// disk is a node's disk that files are laid on. What a file of the archive says is bound to the node's own directories, whatever links it made there.
type disk struct {
	places []Place
	roots  []*os.Root
	move   func(string) string
}

func newDisk(places []Place, move func(string) string) (*disk, error) {
	d := &disk{places: places, move: move}
	for _, p := range places {
		root, err := os.OpenRoot(p.Host)
		if err != nil {
			d.close()
			return nil, err
		}
		d.roots = append(d.roots, root)
	}
	return d, nil
}

func (d *disk) close() {
	for _, r := range d.roots {
		r.Close()
	}
}

// find returns the directory that has the node's path, and the path there.
func (d *disk) find(at string) (*os.Root, string, error) {
	best := -1
	for i, p := range d.places {
		below := strings.HasPrefix(at, strings.TrimSuffix(p.Node, "/")+"/")
		if below && (best < 0 || len(p.Node) > len(d.places[best].Node)) {
			best = i
		}
	}
	if best < 0 {
		return nil, "", errors.New("it is on no disk")
	}
	rel := strings.TrimPrefix(at, strings.TrimSuffix(d.places[best].Node, "/")+"/")
	if !filepath.IsLocal(rel) {
		return nil, "", &InvalidError{fmt.Errorf("%q is no path below a node's root", at)}
	}
	return d.roots[best], rel, nil
}

// put lays a file of the archive where it belongs.
func (d *disk) put(at string, h *tar.Header, content io.Reader) error {
	root, name, err := d.find(at)
	if err != nil {
		return err
	}
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode & 0o7777)
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.MkdirAll(name, 0o755); err != nil {
			return err
		}
		if _, hides := h.PAXRecords[xattrRecord+opaque]; hides {
			if err := within(root, name, func(file string) error { return unix.Setxattr(file, opaque, []byte("y"), 0) }); err != nil {
				return err
			}
		}
	case tar.TypeReg:
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		if strings.HasPrefix(at, "/etc/") && h.Size <= maxText {
			if content, err = d.moved(content); err != nil {
				return err
			}
		}
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, content)
		if capability, ok := h.PAXRecords[xattrRecord+"security.capability"]; ok && err == nil {
			err = unix.Fsetxattr(int(f.Fd()), "security.capability", []byte(capability), 0)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		if err := root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return root.Lchown(name, h.Uid, h.Gid)
	case tar.TypeChar:
		if h.Devmajor != 0 || h.Devminor != 0 {
			return &InvalidError{errors.New("it is a device")}
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		return within(root, path.Dir(name), func(dir string) error {
			return unix.Mknod(path.Join(dir, path.Base(name)), unix.S_IFCHR, 0)
		})
	default:
		return &InvalidError{fmt.Errorf("it is of the kind %q", h.Typeflag)}
	}
	if err := root.Chown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	return within(root, name, func(file string) error { return unix.Chmod(file, uint32(mode)) }) // os.Root knows nothing of set-user-ID
}

// within calls f with a path of the file that does not leave the root, whatever changes meanwhile.
func within(root *os.Root, name string, f func(path string) error) error {
	at, err := root.OpenFile(name, unix.O_PATH, 0)
	if err != nil {
		return err
	}
	defer at.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d", at.Fd()))
}

// moved returns a file of a node's /etc with the lab's own texts and addresses. What is no text stays as it is.
func (d *disk) moved(content io.Reader) (io.Reader, error) {
	data, err := io.ReadAll(content)
	if err != nil {
		return nil, err
	}
	if utf8.Valid(data) && bytes.IndexByte(data, 0) < 0 {
		data = []byte(d.move(string(data)))
	}
	return bytes.NewReader(data), nil
}
