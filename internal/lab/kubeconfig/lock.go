package kubeconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LockedError says that another program held the lock of a kubeconfig for too long.
type LockedError struct {
	Lock   string // the lock file
	Since  time.Time
	Holder string // the content of the lock file; kubectl's is empty
}

func (e *LockedError) Error() string {
	holder := e.Holder
	if holder == "" {
		holder = "kubectl or another program"
	}
	return fmt.Sprintf("%s has it locked since %s: if no such program is running, remove %s and run the command again",
		holder, e.Since.Format(time.DateTime), e.Lock)
}

// IsLocked reports whether err is a LockedError.
func IsLocked(err error) bool {
	var e *LockedError
	return errors.As(err, &e)
}

// patience is how long to wait for another program's lock. kubectl holds one for milliseconds, and does not wait at all.
var patience = 10 * time.Second

const holderPrefix = "fathom, process "

// lock locks a kubeconfig as kubectl does (client-go, clientcmd's lockFile): it creates FILE.lock, which must not exist.
// kubectl creates it beside the name that it was given, so a file that is reached by a link has two locks.
//
// A lock of kubectl's outlives a killed kubectl. Ours is also held open with flock, so that the lock of a killed fathom is
// recognised and taken over.
func lock(path, target string) (unlock func(), err error) {
	names := []string{target + ".lock"}
	if link := path + ".lock"; path != target {
		names = append(names, link)
	}
	slices.Sort(names) // the same order in every process
	var unlocks []func()
	unlock = func() {
		for _, u := range slices.Backward(unlocks) {
			u()
		}
	}
	deadline := time.Now().Add(patience)
	for _, name := range names {
		u, err := lockOne(name, deadline)
		if err != nil {
			unlock()
			return nil, err
		}
		if u != nil {
			unlocks = append(unlocks, u)
		}
	}
	return unlock, nil
}

func lockOne(name string, deadline time.Time) (func(), error) {
	for {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				_, err = fmt.Fprintf(f, "%s%d\n", holderPrefix, os.Getpid())
			}
			if err != nil {
				os.Remove(name)
				f.Close()
				return nil, fmt.Errorf("lock %s: %w", name, err)
			}
			return func() { os.Remove(name); f.Close() }, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("lock it: %w", err)
		}
		f, err = takeOver(name)
		if f != nil {
			return func() { os.Remove(name); f.Close() }, nil
		}
		if err != nil && time.Now().After(deadline) {
			return nil, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// takeOver returns the lock file of a fathom that ended without removing it. It returns nil and a LockedError while another
// process holds the lock, and nil without an error if the lock is gone by now.
func takeOver(name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return nil, nil
	}
	locked := &LockedError{Lock: name, Since: time.Unix(st.Mtim.Unix())}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, locked
	}
	text := make([]byte, 100)
	n, _ := f.Read(text)
	locked.Holder = strings.TrimSpace(string(text[:n]))
	if strings.HasPrefix(locked.Holder, holderPrefix) && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		// The previous holder may have removed it between our open and our lock.
		var opened, there unix.Stat_t
		if unix.Fstat(int(f.Fd()), &opened) == nil && unix.Lstat(name, &there) == nil && opened.Ino == there.Ino && opened.Dev == there.Dev {
			return f, nil
		}
	}
	f.Close()
	return nil, locked
}
