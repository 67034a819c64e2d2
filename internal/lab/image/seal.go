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

// A sealed directory has been written to the disk to its end, and names of it the size of each file. What a bad disk, or a
// power cut under a disk that lies, takes away is noticed by that; to read hundreds of megabytes at each start of
// a lab would cost seconds.
const sealFile = "contents"

// seal writes what there is below dir to the disk, and then the seal beside it, in the directory at.
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

// isWhole says whether dir is as it was sealed.
func isWhole(dir, at string) bool {
	want, err := os.ReadFile(filepath.Join(at, sealFile))
	if err != nil {
		return false
	}
	have, err := listing(dir)
	return err == nil && have == strings.TrimSpace(string(want))
}

// listing is a digest of the names, kinds and sizes of everything below dir, but for a seal.
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

// discard takes a damaged directory out of the way of the one that replaces it, and removes it. aside is a name that is
// swept up if that does not come to its end.
func discard(dir, aside string) error {
	if err := os.RemoveAll(aside); err != nil {
		return err
	}
	if err := durable.Rename(dir, aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(aside)
}
