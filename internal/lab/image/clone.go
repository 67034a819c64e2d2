package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Clone makes dst, which must not exist or be empty, a copy of the template: a node's /var/lib/containerd. Files are hard
// links, so a copy costs little more than its directories. That is safe because containerd writes blobs and snapshots once,
// under new names. Only its databases change in place, and those are copied.
func (s Store) Clone(dst string) error {
	if err := s.clone(dst); err != nil {
		return fmt.Errorf("copy the prepared images to %s: %w", dst, err)
	}
	return nil
}

func (s Store) clone(dst string) error {
	entries, err := os.ReadDir(dst)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			return err
		}
	case err != nil:
		return err
	case len(entries) > 0:
		return fmt.Errorf("it is not empty: it has %s; remove it or choose another directory", entries[0].Name())
	}
	return cloneDir(s.root, dst)
}

// cloneDir copies a directory recursively.
func cloneDir(src, dst string) error {
	info, err := os.Lstat(src)
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	if err := os.Mkdir(dst, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	entries, err := os.ReadDir(src)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		from, to := filepath.Join(src, entry.Name()), filepath.Join(dst, entry.Name())
		switch {
		case entry.IsDir():
			err = cloneDir(from, to)
		case entry.Type().IsRegular() && strings.HasSuffix(entry.Name(), ".db"):
			err = copyFile(from, to)
		default:
			// Symlinks, and the device nodes by which overlayfs marks deletions, can be linked too.
			err = linkFile(from, to, entry.Type().IsRegular())
		}
		if err != nil {
			return err
		}
	}
	if err := os.Lchown(dst, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(src, dst); err != nil {
		return err
	}
	// After the owner, whose change clears the setuid bit, and after the entries, which change the modification time.
	if err := unix.Chmod(dst, uint32(stat.Mode&0o7777)); err != nil {
		return &os.PathError{Op: "chmod", Path: dst, Err: err}
	}
	times := []unix.Timespec{{Sec: stat.Atim.Sec, Nsec: stat.Atim.Nsec}, {Sec: stat.Mtim.Sec, Nsec: stat.Mtim.Nsec}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, dst, times, 0); err != nil {
		return &os.PathError{Op: "utimes", Path: dst, Err: err}
	}
	return nil
}

// linkFile makes a hard link.
func linkFile(from, to string, regular bool) error {
	err := os.Link(from, to) // does not follow symlinks
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("it is on another file system than the template in %s: the nodes' images are hard links, which cannot cross; keep the state of a lab on one file system", filepath.Dir(from))
	case errors.Is(err, unix.EMLINK) && regular:
		return copyFile(from, to) // ext4 allows 65,000 names for a file
	}
	return err
}

// copyFile copies a regular file with its owner, permissions and modification time.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if err := out.Chown(int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	if err := unix.Fchmod(int(out.Fd()), uint32(stat.Mode&0o7777)); err != nil {
		return &os.PathError{Op: "chmod", Path: to, Err: err}
	}
	if err := out.Close(); err != nil {
		return err
	}
	return os.Chtimes(to, info.ModTime(), info.ModTime())
}

// copyXattrs copies extended attributes. In one of them overlayfs records that a directory hides the one below.
func copyXattrs(from, to string) error {
	size, err := unix.Llistxattr(from, nil)
	if errors.Is(err, unix.ENOTSUP) || err == nil && size == 0 {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "listxattr", Path: from, Err: err}
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(from, names); err != nil {
		return &os.PathError{Op: "listxattr", Path: from, Err: err}
	}
	for _, name := range strings.Split(strings.Trim(string(names[:size]), "\x00"), "\x00") {
		value := make([]byte, 1<<16) // the kernel's limit
		n, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			return &os.PathError{Op: "getxattr " + name, Path: from, Err: err}
		}
		if err := unix.Lsetxattr(to, name, value[:n], 0); err != nil {
			return &os.PathError{Op: "setxattr " + name, Path: to, Err: err}
		}
	}
	return nil
}
