package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/durable"
	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/lab/saved"
)

// Saved is a lab that was saved.
type Saved struct {
	Name string // LAB@TIME of those that are kept on this machine; empty for another file
	Path string
	Size int64
	saved.Header
}

// saves is the directory of the labs that are kept, with a directory for each.
func saves(paths Paths) string { return filepath.Join(paths.State, "saves") }

const (
	stamp     = "20060102T150405.000Z" // of the moment in the name of a file, in UTC
	extension = ".tar.zst"
)

// SaveKept saves the lab among those that are kept on this machine, and returns its name there. Only root can read them: they have the lab's secrets.
func (l *Lab) SaveKept(ctx context.Context, o SaveOptions) (Saved, error) {
	o.Secrets = true
	if err := durable.MkdirAll(saves(l.Paths), 0o700); err != nil {
		return Saved{}, fmt.Errorf("save lab %s: %w", l.Name, err)
	}
	at := time.Now().UTC().Format(stamp)
	s := Saved{Name: l.Name + "@" + at, Path: filepath.Join(saves(l.Paths), l.Name, at+extension)}
	if err := l.Save(ctx, s.Path, o); err != nil {
		removeEmpty(filepath.Dir(s.Path), saves(l.Paths))
		return Saved{}, err
	}
	kept, err := OpenSaved(s.Path)
	kept.Name = s.Name
	return kept, err
}

// OpenSaved reads what a file says of its lab.
func OpenSaved(path string) (Saved, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Saved{}, fmt.Errorf("there is no file %s; `fathom save ls` lists the labs that are kept, which have an @ in their names", path)
	}
	if err != nil {
		return Saved{}, err
	}
	s := Saved{Path: path, Size: info.Size()}
	if s.Header, err = saved.ReadHeader(path); err != nil {
		return Saved{}, fmt.Errorf("read %s: %w", path, err)
	}
	return s, nil
}

// Saves returns the labs that are kept, the oldest of each first. The empty name stands for all labs. Files that cannot be read are left out.
func Saves(paths Paths, lab string) ([]Saved, error) {
	labs := []string{lab}
	if lab == "" {
		entries, err := os.ReadDir(saves(paths))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list saved labs: %w", err)
		}
		labs = nil
		for _, e := range entries {
			labs = append(labs, e.Name())
		}
	}
	var all []Saved
	for _, lab := range labs {
		if !topology.IsName(lab) {
			continue
		}
		entries, err := os.ReadDir(filepath.Join(saves(paths), lab))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list saved labs: %w", err)
		}
		for _, e := range entries { // sorted by name, and so by time
			at, ok := strings.CutSuffix(e.Name(), extension)
			if _, err := time.Parse(stamp, at); !ok || err != nil {
				continue
			}
			if s, err := OpenSaved(filepath.Join(saves(paths), lab, e.Name())); err == nil {
				s.Name = lab + "@" + at
				all = append(all, s)
			}
		}
	}
	return all, nil
}

// FindSaved returns the lab that is meant by LAB@TIME or, of the lab of that name, @TIME; @-DURATION is the last one that is at least as old, and
// @ the last of all.
func FindSaved(paths Paths, lab, what string, now time.Time) (Saved, error) {
	name, at, _ := strings.Cut(what, "@")
	if name == "" {
		name = lab
	}
	all, err := Saves(paths, name)
	if err != nil {
		return Saved{}, err
	}
	var have []string
	for _, s := range all {
		have = append(have, s.Name)
	}
	missing := &NotFoundError{Kind: "saved lab", Name: what, Have: have, Hint: "`fathom save ls` lists them"}
	before := now
	if back, ok := strings.CutPrefix(at, "-"); ok {
		d, err := time.ParseDuration(back)
		if err != nil || d < 0 {
			return Saved{}, fmt.Errorf("%s: want a duration such as @-5m: %w", what, err)
		}
		before = now.Add(-d)
	} else if at != "" {
		for _, s := range all {
			if s.Name == name+"@"+at {
				return s, nil
			}
		}
		return Saved{}, missing
	}
	for _, s := range slices.Backward(all) {
		if !s.Taken.After(before) {
			return s, nil
		}
	}
	return Saved{}, missing
}

// RemoveSaved removes a lab that is kept.
func RemoveSaved(paths Paths, s Saved) error {
	if err := os.Remove(s.Path); err != nil {
		return fmt.Errorf("remove the saved lab %s: %w", s.Name, err)
	}
	removeEmpty(filepath.Dir(s.Path), saves(paths), paths.State)
	return nil
}

// PruneSaved removes the oldest of a lab's periodic ones, of which so many stay.
func PruneSaved(paths Paths, lab string, keep int) error {
	all, err := Saves(paths, lab)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(s Saved) bool { return !s.Periodic })
	for _, s := range all[:max(0, len(all)-keep)] {
		if err := RemoveSaved(paths, s); err != nil {
			return err
		}
	}
	return nil
}

// ForkName returns a name that no lab has for a fork of the lab of that name.
func ForkName(paths Paths, name string) (string, error) {
	for n := 2; n < 1000; n++ {
		suffix := fmt.Sprintf("-%d", n)
		next := name[:min(len(name), 20-len(suffix))] + suffix
		l := &Lab{Lab: topology.Lab{Name: next}, Paths: paths}
		if !l.traces() {
			return next, nil
		}
	}
	return "", fmt.Errorf("there are too many forks of lab %s: give the next one a --name", name)
}

// Fork saves the lab and brings it up once more under another name. Both go on, and share no key.
func (l *Lab) Fork(ctx context.Context, name string, o SaveOptions, report Report) (*Lab, error) {
	o.Secrets = true
	if err := makePrivate(l.Paths); err != nil {
		return nil, err
	}
	temp, err := os.MkdirTemp(l.dir(), ".fork-")
	if err != nil {
		return nil, fmt.Errorf("fork lab %s: %w", l.Name, err)
	}
	defer os.RemoveAll(temp)
	file := filepath.Join(temp, "fork"+extension)
	t := &timeline{report: report}
	if err := t.step("", "save lab "+l.Name, func() error { return l.Save(ctx, file, o) }); err != nil {
		return nil, err
	}
	return Restore(ctx, l.Paths, file, RestoreOptions{Name: name, HostPaths: true}, report)
}
