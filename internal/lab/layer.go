package lab

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/durable"
)

// kitLayer returns a directory with the kit's programs where a node's packages would put them. It is made
// once for each kit. Nodes overlay it, and so share its files and the memory that the kernel caches them in.
func (l *Lab) kitLayer() (string, error) {
	sources := map[string]string{l.Kit.BinDir(): "usr/local/bin", l.Kit.CNIDir(): "opt/cni/bin"}
	key, err := layerKey(sources)
	if err != nil {
		return "", fmt.Errorf("lay the kit over the nodes' root: %w", err)
	}
	dir := filepath.Join(l.Paths.Cache, "layers", key)
	if isLayer(dir, sources) {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := fillLayer(tmp, sources); err != nil {
		return "", fmt.Errorf("lay the kit over the nodes' root: %w", err)
	}
	if err := durable.SyncAll(tmp); err != nil {
		return "", fmt.Errorf("lay the kit over the nodes' root: %w", err)
	}
	// Two commands may do this at once: the first rename wins, and both layers are alike.
	err = durable.Rename(tmp, dir)
	if (errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY)) && !isLayer(dir, sources) {
		// What is there is damaged. Nodes that run have it open; it goes with tmp.
		err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return "", err
	}
	return dir, nil
}

// isLayer says whether dir has all files of the sources. Of what is in them the sizes are compared.
func isLayer(dir string, sources map[string]string) bool {
	for from, to := range sources {
		entries, err := os.ReadDir(from)
		if err != nil {
			return false
		}
		for _, e := range entries {
			want, err := e.Info()
			if err != nil {
				return false
			}
			have, err := os.Lstat(filepath.Join(dir, to, e.Name()))
			if err != nil || have.Mode().Type() != want.Mode().Type() || have.Size() != want.Size() {
				return false
			}
		}
	}
	return true
}

func layerKey(sources map[string]string) (string, error) {
	h := sha256.New()
	for _, source := range []string{"usr/local/bin", "opt/cni/bin"} {
		for from, to := range sources {
			if to != source {
				continue
			}
			entries, err := os.ReadDir(from)
			if err != nil {
				return "", err
			}
			for _, e := range entries {
				info, err := e.Info()
				if err != nil {
					return "", err
				}
				fmt.Fprintln(h, from, e.Name(), info.Size(), info.ModTime().UnixNano())
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

func fillLayer(dir string, sources map[string]string) error {
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	for from, to := range sources {
		target := filepath.Join(dir, to)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		entries, err := os.ReadDir(from)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := linkOrCopy(filepath.Join(from, e.Name()), filepath.Join(target, e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// linkOrCopy makes target the same file as source, or a copy where they are on different file systems.
func linkOrCopy(source, target string) error {
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		to, err := os.Readlink(source)
		if err != nil {
			return err
		}
		return os.Symlink(to, target)
	}
	err = os.Link(source, target)
	if !errors.Is(err, unix.EXDEV) {
		return err
	}
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
