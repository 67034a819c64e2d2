package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// Free space: an idle default lab takes a few hundred MiB, images and logs the rest.
const (
	leastDisk  = 2 << 30
	enoughDisk = 10 << 30
)

// File systems that cannot hold a lab, because overlayfs does not support them for its upper directory.
var badFileSystems = map[int64]string{
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	unix.NFS_SUPER_MAGIC:       "NFS",
	unix.SMB_SUPER_MAGIC:       "SMB",
	unix.MSDOS_SUPER_MAGIC:     "FAT",
	unix.V9FS_MAGIC:            "9P",
	0x65735546:                 "FUSE",
	0xff534d42:                 "CIFS",
}

func (e *exam) storage(context.Context) {
	if e.StateDir == "" {
		return
	}
	dir := existing(e.StateDir)
	const elsewhere = "choose another state directory, on a local disk"
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		e.fail(storage, "state directory", fmt.Sprintf("read the file system of %s: %v", dir, err), elsewhere)
		return
	}
	e.space(dir, uint64(st.Bavail)*uint64(st.Bsize))
	if name, bad := badFileSystems[int64(st.Type)]; bad {
		e.fail(storage, "state directory", fmt.Sprintf("%s is on %s, which cannot hold the nodes' root file systems", dir, name), elsewhere)
		return
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		e.fail(storage, "state directory", dir+" is mounted noexec: containers' programs cannot run", elsewhere+", or mount -o remount,exec it")
		return
	}
	if !e.Quick {
		switch {
		case st.Flags&unix.ST_NOSUID != 0:
			e.warn(storage, "state directory", dir+" is mounted nosuid: set-user-ID programs do not work in containers", elsewhere)
		case st.Type == unix.TMPFS_MAGIC:
			e.warn(storage, "state directory", dir+" is on tmpfs: a lab's files take memory and are gone after a reboot", elsewhere)
		}
	}
	if os.Geteuid() != 0 {
		e.warn(storage, "overlayfs", "only root can try it", "run it with sudo")
		return
	}
	e.tryStorage(dir)
}

// existing returns dir or its nearest existing ancestor, which is on the same file system unless one is mounted later.
func existing(dir string) string {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	for {
		if st, err := os.Stat(dir); err == nil && st.IsDir() || dir == "/" {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func (e *exam) space(dir string, free uint64) {
	found := fmt.Sprintf("%s free in %s", size(free), dir)
	const remedy = "free some space, or choose another state directory"
	switch {
	case free < leastDisk:
		e.fail(storage, "disk", found+"; a lab needs at least "+size(leastDisk), remedy)
	case e.Quick:
	case free < enoughDisk:
		e.warn(storage, "disk", found+"; with images and logs a lab may fill it", remedy)
	default:
		e.ok(storage, "disk", found)
	}
}

// tryStorage creates a file, a hard link and an overlay in a temporary directory, and removes them.
func (e *exam) tryStorage(dir string) {
	tmp, err := os.MkdirTemp(dir, ".fathom-doctor-")
	if err != nil {
		e.fail(storage, "state directory", fmt.Sprintf("make a directory in %s: %v", dir, err), "choose another state directory")
		return
	}
	defer os.RemoveAll(tmp)

	file := filepath.Join(tmp, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		e.fail(storage, "state directory", fmt.Sprintf("write a file in %s: %v", dir, err), "choose another state directory")
		return
	}
	if err := os.Link(file, file+"2"); err != nil {
		e.fail(storage, "hard links", fmt.Sprintf("link two files in %s: %v; images are shared between nodes by hard links", dir, err), "choose a state directory on ext4, xfs or btrfs")
	} else {
		e.have(true, storage, "hard links", "work in "+dir)
	}
	if err := tryOverlay(tmp); err != nil {
		remedy := "choose a state directory on ext4, xfs or btrfs"
		if errors.Is(err, unix.ENODEV) {
			remedy = e.host.kernelRemedy("overlay")
		} else if errors.Is(err, unix.EPERM) {
			remedy = privileged
		}
		e.fail(storage, "overlayfs", err.Error()+"; nodes have no root file system without it", remedy)
	} else {
		e.have(true, storage, "overlayfs", "works over / with its changes in "+dir)
	}
}

// tryOverlay mounts an overlay like a node's root file system: the host's below, changes in dir. The mount namespace ends
// with the thread, which is never unlocked.
func tryOverlay(dir string) error {
	for _, name := range []string{"upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return err
		}
	}
	merged := filepath.Join(dir, "merged")
	options := fmt.Sprintf("lowerdir=/,upperdir=%s,workdir=%s", filepath.Join(dir, "upper"), filepath.Join(dir, "work"))
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("make a mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("make the mount namespace private: %w", err)
			}
			if err := unix.Mount("fathom", merged, "overlay", 0, options); err != nil {
				return fmt.Errorf("mount overlayfs over / with its changes in %s: %w", dir, err)
			}
			// Unmounted at once: the namespace may outlive the removal of its directory.
			defer func() { _ = unix.Unmount(merged, unix.MNT_DETACH) }()
			if err := os.WriteFile(filepath.Join(merged, "fathom-doctor"), []byte("x"), 0o600); err != nil {
				return fmt.Errorf("write to an overlayfs: %w", err)
			}
			return nil
		}()
	}()
	return <-result
}

// size formats bytes for people.
func size(n uint64) string {
	if n < 1<<30 {
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}
