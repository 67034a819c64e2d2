// Package durable writes the files that a node or a lab keeps across a power cut.
//
// A rename alone is not enough: ext4 and xfs may write the new name to the disk before what the file has, and what
// is found under the name after a power cut is then empty or zeros. So a file is written under another name, synced,
// renamed, and its directory is synced (fsync(2); "All File Systems Are Not Created Equal", OSDI 2014).
//
// What is read back may be damaged all the same, by an older version, a bad disk or a person. SetAside keeps it for
// who wants to know, out of the way of the one that replaces it.
package durable

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// WriteFile makes the file at path have these bytes, as Write does.
func WriteFile(path string, data []byte, mode fs.FileMode) error {
	return Write(path, bytes.NewReader(data), mode)
}

// Write makes the file at path have what data yields, with the given permissions. Whoever opens it finds the old file
// or the new one, whole, also after a power cut; once Write has returned it is the new one. Directories that are
// missing on the way are made. If it fails, the old file may be there still or the new one already. Of two that write one
// file at once the last wins; nothing of the other is left.
func Write(path string, data io.Reader, mode fs.FileMode) error {
	f, err := Stage(path, data, mode)
	if err != nil {
		return err
	}
	return f.Commit()
}

// A Staged file is on the disk, under a name that nobody reads.
type Staged struct {
	file *os.File // held, with its lock
	path string
}

// Stage does the slow part of Write, for who must not wait for the disk while it holds a lock. Commit or Discard ends it.
func Stage(path string, data io.Reader, mode fs.FileMode) (*Staged, error) {
	dir, base := filepath.Split(filepath.Clean(path))
	if err := MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	prefix := "." + base + ".new-" // runtimes take no file with a dot in front and such an ending for configuration
	sweep(dir, prefix)
	temp, err := os.CreateTemp(dir, prefix)
	if err != nil {
		return nil, err
	}
	s := &Staged{temp, path}
	// The lock says that the file is in the making, and goes with the process.
	err = unix.Flock(int(temp.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		_, err = io.Copy(temp, data)
	}
	if err == nil {
		err = temp.Chmod(mode)
	}
	if err == nil {
		err = temp.Sync()
	}
	if err != nil {
		s.Discard()
		return nil, fmt.Errorf("write %s: %w", path, err)
	}
	return s, nil
}

// Commit puts the file in its place.
func (s *Staged) Commit() error {
	// Before the rename: a program cannot be run while it is open for writing (ETXTBSY).
	name := s.file.Name()
	if err := s.file.Close(); err != nil {
		os.Remove(name)
		return fmt.Errorf("write %s: %w", s.path, err)
	}
	if err := Rename(name, s.path); err != nil {
		os.Remove(name)
		return err
	}
	return nil
}

// Discard forgets the file.
func (s *Staged) Discard() {
	os.Remove(s.file.Name())
	s.file.Close()
}

// sweep removes what writers of the same file left when they were killed.
func sweep(dir, prefix string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), prefix) || !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.Remove(path)
		}
		f.Close()
	}
}

// Rename renames a file or a directory whose contents are on the disk already, and has the disk know of it.
func Rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(to))
}

// Damaged is what SetAside puts behind a file's name.
const Damaged = ".damaged"

// SetAside renames a damaged file to NAME.damaged, over an older one, and returns the new name. That there is no such
// file (any more) is not an error.
func SetAside(path string) (string, error) {
	aside := path + Damaged
	if err := Rename(path, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("move the damaged %s aside: %w", path, err)
	}
	return aside, nil
}

// MkdirAll is os.MkdirAll for directories that are still there after a power cut.
func MkdirAll(dir string, mode fs.FileMode) error {
	dir = filepath.Clean(dir)
	if info, err := os.Stat(dir); err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: unix.ENOTDIR}
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if err := MkdirAll(parent, mode); err != nil {
		return err
	}
	if err := os.Mkdir(dir, mode); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncDir(parent)
}

// SyncDir has the disk know of the names in a directory. File systems that cannot do that for directories say
// EINVAL; there is no more to be had of them.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// SyncAll has the disk know of everything that was written to the file system that holds dir, by whomever. It is for trees
// of many files, each of which would otherwise have the journal committed of its own.
func SyncAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return &fs.PathError{Op: "syncfs", Path: dir, Err: err}
	}
	return nil
}
