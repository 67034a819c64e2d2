package kubeconfig

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/durable"
)

// Files returns the kubeconfig files that kubectl merges: those of $KUBECONFIG, or ~/.kube/config.
func Files() []string {
	var files []string
	for file := range strings.SplitSeq(os.Getenv("KUBECONFIG"), string(filepath.ListSeparator)) {
		if file != "" && !slices.Contains(files, file) {
			files = append(files, file)
		}
	}
	if len(files) == 0 {
		home, _ := os.UserHomeDir()
		files = append(files, filepath.Join(home, ".kube", "config"))
	}
	return files
}

// Target returns the file that new contexts go to: the first that exists, otherwise the last, as in client-go's
// PathOptions.GetDefaultFilename.
func Target(files []string) string {
	for _, file := range files {
		if _, err := os.Stat(file); err == nil {
			return file
		}
	}
	return files[len(files)-1]
}

// Put adds a lab's entries to the target among several files, and removes them from the others. If $KUBECONFIG is
// /dev/null, nothing is written.
func Put(files []string, lab string, entries []Entry) error {
	target := Target(files)
	if err := hidden(files, target, lab, entries); err != nil {
		return explain(err)
	}
	err := edit(target, func(text []byte, made Made) ([]byte, Made, error) {
		text, err := Add(text, lab, entries, made)
		return text, Made{}, err
	})
	if err != nil {
		return explain(fmt.Errorf("put the contexts of lab %s into the kubeconfig %s: %w", lab, target, err))
	}
	for _, file := range files {
		if file != target {
			if err := Take(file, lab); err != nil {
				return err
			}
		}
	}
	return nil
}

// Check returns the error that Put would return for contexts of these names, and changes nothing.
func Check(files []string, lab string, names []string) error {
	entries := make([]Entry, len(names))
	for i, name := range names {
		entries[i] = Entry{Name: name, Cluster: []byte("{}"), User: []byte("{}")}
	}
	target := Target(files)
	if err := hidden(files, target, lab, entries); err != nil {
		return explain(err)
	}
	path, err := resolve(target)
	if err != nil {
		return explain(err)
	}
	text, st, err := read(path)
	if err != nil || isNull(st) {
		return explain(err)
	}
	if _, err := Add(text, lab, entries, Made{}); err != nil {
		return explain(fmt.Errorf("check whether the contexts of lab %s can be added to the kubeconfig %s: %w", lab, target, err))
	}
	return nil
}

// hidden looks for entries with a lab's names in the files that are merged with the target: the target's entries would hide
// them.
func hidden(files []string, target, lab string, entries []Entry) error {
	for _, file := range files {
		if file == target {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			continue // kubectl skips it, too
		}
		f, err := open(text)
		if err != nil {
			continue
		}
		for _, e := range entries {
			if err := f.taken(lab, e.Name); err != nil {
				return fmt.Errorf("read the kubeconfig %s: %w", file, err)
			}
		}
	}
	return nil
}

// Take removes a lab's entries from a file. A file that does not exist, or has nothing of the lab, is not touched.
func Take(path, lab string) error {
	target, err := resolve(path)
	if err != nil {
		return explain(err)
	}
	text, _, err := read(target)
	_, tempErr := os.Lstat(temporary(target))
	if IsUneditable(err) || err == nil && !bytes.Contains(text, []byte(Mark)) && tempErr != nil {
		return nil
	}
	if err != nil {
		return explain(err)
	}
	err = edit(path, func(text []byte, _ Made) ([]byte, Made, error) { return Remove(text, lab) })
	if err != nil {
		return explain(fmt.Errorf("take the contexts of lab %s out of the kubeconfig %s: %w", lab, path, err))
	}
	return nil
}

// explain adds what to do about the error.
func explain(err error) error {
	switch {
	case IsTaken(err):
		return fmt.Errorf("%w: rename it (`kubectl config rename-context`) or delete it, or give the lab another --name", err)
	case IsUneditable(err):
		return fmt.Errorf("%w; it is as it was. Set KUBECONFIG to another file, or to /dev/null for none", err)
	}
	return err
}

// edit replaces a file's text atomically. It keeps the file's owner, mode and extended attributes, and symbolic links to
// it. change receives what would have to be created, and returns what has to be removed.
func edit(path string, change func([]byte, Made) ([]byte, Made, error)) (err error) {
	target, err := resolve(path)
	if err != nil {
		return err
	}
	if _, st, err := read(target); err != nil || isNull(st) {
		return err
	}
	made := Made{}
	dir := filepath.Dir(target)
	if made.Directories, err = makeDirs(dir); err != nil {
		return err
	}
	gone := made // what is removed unless the file is written
	defer func() { removeDirs(dir, gone.Directories) }()

	unlock, err := lock(path, target)
	if err != nil {
		return err
	}
	defer unlock()
	// A killed command may have left it, and it contains keys.
	if err := os.Remove(temporary(target)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, st, err := read(target)
	if err != nil || isNull(st) {
		return err
	}
	made.File = st == nil
	next, left, err := change(text, made)
	if err != nil {
		return err
	}
	switch {
	case left.File:
		gone = left
		if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return durable.SyncDir(dir)
	case st != nil && bytes.Equal(text, next) || st == nil && len(next) == 0:
		return nil
	}
	if err := write(target, next, st); err != nil {
		return err
	}
	gone = Made{}
	return nil
}

// resolve follows symbolic links to the file that they point to, which need not exist.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for range 40 { // as many as the kernel follows, path_resolution(7)
		link, err := os.Readlink(path)
		if err != nil {
			return path, nil // it is not a link, or does not exist
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(path), link)
		}
		path = link
	}
	return "", refuse("the symbolic links of %s form a loop", path)
}

// read returns the text of a file and its attributes; nil if it does not exist.
func read(path string) ([]byte, *unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("stat %s: %w", path, err)
	}
	switch {
	case isNull(&st):
		return nil, &st, nil
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, nil, refuse("%s is not a regular file", path)
	case st.Nlink > 1:
		return nil, nil, refuse("%s has %d hard links, which replacing it would break", path, st.Nlink)
	}
	text, err := os.ReadFile(path)
	return text, &st, err
}

// isNull reports whether a file is /dev/null.
func isNull(st *unix.Stat_t) bool {
	return st != nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// temporary is where the next text of a file is written. Only the holder of the lock writes there, so what is found there
// is left over.
func temporary(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".fathom")
}

// write replaces a file, or creates one that is readable only by its owner: the owner of the directory.
func write(path string, text []byte, old *unix.Stat_t) (err error) {
	temp := temporary(path)
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_EXCL|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(temp)
		}
	}()
	if _, err := f.Write(text); err != nil {
		return err
	}
	mode := fs.FileMode(0o600)
	var uid, gid int
	if old != nil {
		mode, uid, gid = fs.FileMode(old.Mode&0o777), int(old.Uid), int(old.Gid)
	} else if uid, gid, err = ownerIn(filepath.Dir(path)); err != nil {
		return err
	}
	if err := own(f, uid, gid); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if old != nil {
		if err := copyAttributes(path, f); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

// own changes the owner of a file if it differs: an ordinary user may not.
func own(f *os.File, uid, gid int) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if int(st.Uid) == uid && int(st.Gid) == gid {
		return nil
	}
	return f.Chown(uid, gid)
}

// ownerIn returns the owner of a new file in a directory. It is the directory's owner, which also under sudo is the user in
// a user's home. In a directory where everybody may create files (/tmp) it is the user who called sudo, if any.
func ownerIn(dir string) (uid, gid int, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", dir, err)
	}
	if os.Geteuid() != 0 {
		return os.Geteuid(), os.Getegid(), nil
	}
	if st.Mode&unix.S_ISVTX != 0 && st.Mode&0o002 != 0 {
		uid, errUID := strconv.Atoi(os.Getenv("SUDO_UID"))
		gid, errGID := strconv.Atoi(os.Getenv("SUDO_GID"))
		if errUID == nil && errGID == nil {
			return uid, gid, nil
		}
	}
	return int(st.Uid), int(st.Gid), nil
}

// copyAttributes copies access control lists, security labels and other extended attributes.
func copyAttributes(from string, to *os.File) error {
	names := make([]byte, 64<<10) // the kernel's limit, xattr(7)
	n, err := unix.Listxattr(from, names)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the extended attributes of %s: %w", from, err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		if name == "" {
			continue
		}
		n, err := unix.Getxattr(from, name, value)
		if err == nil {
			err = unix.Fsetxattr(int(to.Fd()), name, value[:n], 0)
		}
		if err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("copy the extended attribute %s of %s: %w", name, from, err)
		}
	}
	return nil
}

// makeDirs creates a directory and missing ones above it, with the owner of the first existing one. It returns how many it
// created.
func makeDirs(dir string) (int, error) {
	var missing []string
	for {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			break // it exists, or the next step fails with the same error
		}
		missing = append(missing, dir)
		dir = filepath.Dir(dir)
	}
	for i, path := range slices.Backward(missing) {
		uid, gid, err := ownerIn(filepath.Dir(path))
		if err == nil {
			err = os.Mkdir(path, 0o700)
		}
		if err == nil {
			err = os.Lchown(path, uid, gid)
		}
		if err != nil {
			return len(missing) - i, fmt.Errorf("make the directory %s: %w", path, err)
		}
	}
	return len(missing), nil
}

// removeDirs removes a directory and count-1 above it, as long as they are empty.
func removeDirs(dir string, count int) {
	for range count {
		if os.Remove(dir) != nil {
			return
		}
		dir = filepath.Dir(dir)
	}
}

// WriteSecret writes a file that only its owner can read, even if it exists with wider permissions. If it is not a regular
// file, such as a pipe, it is written in place.
func WriteSecret(path string, text []byte) error {
	target, err := resolve(path)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	err = unix.Lstat(target, &st)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return write(target, text, nil)
	case err != nil:
		return err
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.Write(text)
		return errors.Join(err, f.Close())
	}
	st.Mode = st.Mode&^0o777 | 0o600
	return write(target, text, &st)
}
