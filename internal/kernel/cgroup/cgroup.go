// Package cgroup places the processes of a lab in control groups of their own, so that everything a lab
// runs can be found, counted and ended by mark, never by a name pattern. A group here is a path such as
// "fathom/LAB/NODE" that exists in every hierarchy of the machine: the one of cgroup v2, each controller
// of cgroup v1, or both (hybrid).
//
// Sources: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/cgroups.rst.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Mode says which cgroup versions a machine uses.
type Mode string

// The modes of a machine.
const (
	V1     Mode = "v1"     // controllers on v1, no v2 hierarchy
	Hybrid Mode = "hybrid" // controllers on v1, an empty v2 hierarchy beside them
	V2     Mode = "v2"
)

// Hierarchy is one mounted cgroup file system.
type Hierarchy struct {
	Path    string // where it is mounted, such as /sys/fs/cgroup/memory
	Options string // its v1 mount options ("memory", "name=systemd"); empty for v2
	V2      bool
}

// Hierarchies returns the cgroup file systems that the calling process sees, and the mode they make.
func Hierarchies() ([]Hierarchy, Mode, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, "", fmt.Errorf("read the mounted cgroup file systems: %w", err)
	}
	return parseMounts(string(mounts))
}

func parseMounts(mounts string) ([]Hierarchy, Mode, error) {
	var all []Hierarchy
	var v1, v2 bool
	seen := map[string]bool{}
	for line := range strings.Lines(mounts) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		h := Hierarchy{Path: f[1]}
		switch f[2] {
		case "cgroup2":
			h.V2 = true
		case "cgroup":
			h.Options = controllers(f[3])
		default:
			continue
		}
		// A hierarchy can be mounted more than once (a container's view, a bind): once is enough.
		if seen[h.Options] {
			continue
		}
		seen[h.Options] = true
		v1, v2 = v1 || !h.V2, v2 || h.V2
		all = append(all, h)
	}
	switch {
	case v1 && v2:
		return all, Hybrid, nil
	case v2:
		return all, V2, nil
	case v1:
		return all, V1, nil
	}
	return nil, "", errors.New("no cgroup file system is mounted: mount cgroup2 on /sys/fs/cgroup")
}

// controllers keeps, of a v1 mount's options, those that name the hierarchy.
func controllers(options string) string {
	var keep []string
	for o := range strings.SplitSeq(options, ",") {
		switch o {
		case "rw", "ro", "relatime", "noatime", "nosuid", "nodev", "noexec", "xattr", "seclabel", "clone_children":
		default:
			if !strings.HasPrefix(o, "release_agent=") {
				keep = append(keep, o)
			}
		}
	}
	return strings.Join(keep, ",")
}

// v2Controllers are those that containers use.
var v2Controllers = []string{"cpu", "cpuset", "memory", "pids", "io", "hugetlb"}

// Create makes the group in every hierarchy, and in v2 lets it use the controllers: the groups above it must hold no
// process. A group that exists is not an error.
func Create(group string) error {
	all, mode, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := h.create(group, mode); err != nil {
			return fmt.Errorf("create cgroup %s in %s: %w", group, h.Path, err)
		}
	}
	return nil
}

func (h Hierarchy) create(group string, mode Mode) error {
	dir := h.Path
	for part := range strings.SplitSeq(filepath.Clean(group), "/") {
		if mode == V2 {
			delegate(dir)
		}
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if strings.Contains(h.Options, "cpuset") {
			// A new v1 cpuset has no CPU and no memory node, and nothing can enter it until it has.
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inheritCpuset(parent, dir, file); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// delegate lets the groups below dir use the controllers: all or, where dir has a process, none, which one write
// for all of them sees to. A controller that the machine lacks or that another manager withholds is not an error
// here: doctor reports it.
func delegate(dir string) {
	have, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	var want []string
	for c := range strings.FieldsSeq(string(have)) {
		if slices.Contains(v2Controllers, c) {
			want = append(want, "+"+c)
		}
	}
	_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(strings.Join(want, " ")), 0o644)
}

func inheritCpuset(parent, dir, file string) error {
	have, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil || strings.TrimSpace(string(have)) != "" {
		return err
	}
	want, err := os.ReadFile(filepath.Join(parent, file))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, file), want, 0o644)
}

// SetCPUWeight gives the group times the processor time that it would have of itself when all want some; what
// nobody wants is free to all, as before. A machine without the controller is not an error: doctor reports it.
//
// In v1 a group competes not only with the groups beside it but with each thread of the group above it.
func SetCPUWeight(group string, times int) error {
	all, mode, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		file, weight := "cpu.weight", min(100*times, 10000)
		if !h.V2 {
			file, weight = "cpu.shares", min(1024*times, 262144)
		}
		if !h.V2 && !slices.Contains(strings.Split(h.Options, ","), "cpu") || h.V2 && mode != V2 {
			continue
		}
		path := filepath.Join(h.Path, group, file)
		// Without O_CREATE, which os.WriteFile uses and a cgroup file system answers with another error.
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = f.WriteString(strconv.Itoa(weight))
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			return fmt.Errorf("set the processor weight of cgroup %s: %w", group, err)
		}
	}
	return nil
}

// Enter moves the calling process into the group in every hierarchy.
func Enter(group string) error { return move(group, 0, true) }

// Nest moves the calling process, the only one of the group, into a new group right below it, and lets the groups
// below use the controllers. It is for cgroup v2 alone, where no group but the root can have both processes and
// controllers for those below it.
//
// The controllers come last. The kernel hands cpu, cpuset and pids down from a group that has a process, but makes
// it the root of a threaded subtree by that, and nothing can enter the groups below: cgroup-v2.rst, "Threads".
func Nest(group, name string) error {
	all, mode, err := Hierarchies()
	if err != nil {
		return err
	}
	if mode != V2 {
		return fmt.Errorf("nest cgroup %s: this machine has cgroups of %s", group, mode)
	}
	dir := filepath.Join(all[0].Path, group)
	if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := Enter(filepath.Join(group, name)); err != nil {
		return err
	}
	delegate(dir)
	return nil
}

// Add moves a process that was started with SysProcAttr.UseCgroupFD into the group of the v1 hierarchies,
// which clone knows nothing of. Process 0 is the calling one.
func Add(group string, pid int) error { return move(group, pid, false) }

func move(group string, pid int, v2 bool) error {
	all, _, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if h.V2 && !v2 {
			continue
		}
		path := filepath.Join(h.Path, group, "cgroup.procs")
		err := os.WriteFile(path, []byte(strconv.Itoa(pid)), 0o644)
		if err != nil && !errors.Is(err, unix.ESRCH) { // a process that has ended is in no group
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// Open opens the group's directory in the v2 hierarchy, for SysProcAttr.CgroupFD. It returns nil and no
// error where there is no v2 hierarchy.
func Open(group string) (*os.File, error) {
	all, _, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	for _, h := range all {
		if h.V2 {
			return os.Open(filepath.Join(h.Path, group))
		}
	}
	return nil, nil
}

// Procs returns the ids of the processes in the group and in the groups below it, in no order.
func Procs(group string) ([]int, error) {
	all, _, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	var pids []int
	for _, h := range all {
		err := filepath.WalkDir(filepath.Join(h.Path, group), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return nil // a group that went away while we looked holds nothing
			}
			if !d.IsDir() {
				return nil
			}
			data, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for f := range strings.FieldsSeq(string(data)) {
				if pid, err := strconv.Atoi(f); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					pids = append(pids, pid)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return pids, nil
}

// Kill ends every process in the group and below it with SIGKILL and returns when none is left.
func Kill(ctx context.Context, group string) error {
	all, _, err := Hierarchies()
	if err != nil {
		return err
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		for _, h := range all {
			if h.V2 { // one write ends the whole tree, with no race against fork (Linux 5.14)
				_ = os.WriteFile(filepath.Join(h.Path, group, "cgroup.kill"), []byte("1"), 0o644)
			}
		}
		pids, err := Procs(group)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			if pid == os.Getpid() {
				return fmt.Errorf("end the processes of cgroup %s: this process is one of them", group)
			}
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end the processes of cgroup %s: %d are left (such as %d): %w", group, len(pids), pids[0], ctx.Err())
		case <-time.After(wait):
		}
	}
}

// Remove deletes the group and the groups below it in every hierarchy. They must hold no process.
func Remove(group string) error {
	all, _, err := Hierarchies()
	if err != nil {
		return err
	}
	var problems []error
	for _, h := range all {
		if err := removeTree(filepath.Join(h.Path, group)); err != nil {
			problems = append(problems, fmt.Errorf("remove cgroup %s: %w", group, err))
		}
	}
	return errors.Join(problems...)
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// The kernel empties a group of ended processes a little after they were reaped.
	for range 200 {
		if err = unix.Rmdir(dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Prune deletes the group where nothing is in it. Another lab may have begun to use it.
func Prune(group string) error {
	all, _, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		err := unix.Rmdir(filepath.Join(h.Path, group))
		if err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup %s: %w", group, err)
		}
	}
	return nil
}

// List returns the names of the groups right below group, from whichever hierarchy has them.
func List(group string) ([]string, error) {
	all, _, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var names []string
	for _, h := range all {
		entries, err := os.ReadDir(filepath.Join(h.Path, group))
		if err != nil {
			continue
		}
		for _, e := range entries {
			if e.IsDir() && !seen[e.Name()] {
				seen[e.Name()] = true
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}
