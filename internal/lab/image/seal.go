package image

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/fathom-network/fathom/internal/durable"
)

// A sealed directory has been written to the disk completely, and its seal has the names and sizes of all files. The seal
// detects losses by a bad disk, or by a power cut with a disk that acknowledges writes too early. Rejected: checksums,
// since reading hundreds of megabytes at each start of a lab would take seconds.
const sealFile = "contents"

// seal syncs everything below dir to the disk, and then writes the seal, in the directory at.
func seal(dir, at string) error {
	sum, err := listing(dir)
	if err != nil {
		return err
	}
	if err := durable.SyncAll(dir); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(at, sealFile), []byte(sum+"\n"), 0o644)
}

// isWhole reports whether dir is as it was sealed.
func isWhole(dir, at string) bool {
	want, err := os.ReadFile(filepath.Join(at, sealFile))
	if err != nil {
		return false
	}
	have, err := listing(dir)
	return err == nil && have == strings.TrimSpace(string(want))
}

// listing returns a digest of the names, kinds and sizes of everything below dir, except a seal.
func listing(dir string) (string, error) {
	digest := sha256.New()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == filepath.Join(dir, sealFile) {
			return err
		}
		var size int64
		if entry.Type().IsRegular() {
			info, err := entry.Info()
			if err != nil {
				return err
			}
			size = info.Size()
		}
		fmt.Fprintf(digest, "%q %o %d\n", strings.TrimPrefix(path, dir), entry.Type(), size)
		return nil
	})
	return hex.EncodeToString(digest.Sum(nil)), err
}

// discard moves a damaged directory out of the way of its replacement, and removes it. aside is a name that a later sweep
// removes if discard is interrupted.
func discard(dir, aside string) error {
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := durable.Rename(dir, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(aside)
}
