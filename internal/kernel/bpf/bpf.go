// Package bpf is what the eBPF programs in the packages below it share: where they are pinned, and how what the kernel holds
// is compared with what it should. Each package has its program in C beside its Go, NAME/NAME.c; kernel.h is what they
// include, and compile makes the objects. Package pin is the part that needs no library for eBPF.
package bpf

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

//go:generate ./compile

// UnsupportedError says what the kernel lacks for a program to be loaded.
type UnsupportedError struct {
	Without string   // what there is not for that, such as "no fast path"
	Missing []string // such as "bpf_redirect_peer (Linux 5.10)"
	Instead string   // what does the same
}

func (e *UnsupportedError) Error() string {
	return e.Without + ": this kernel has no " + strings.Join(e.Missing, ", no ") + "; " + e.Instead
}

// MakeDir makes a directory of pins, and mounts a bpffs on /sys/fs/bpf where the directory is below that and a node has none.
func MakeDir(dir string) error {
	const root = "/sys/fs/bpf"
	if strings.HasPrefix(dir, root+"/") && !isBPF(root) {
		if err := unix.Mount("bpf", root, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount a bpffs on %s: %w", root, err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the directory of pins: %w", err)
	}
	if !isBPF(dir) {
		return fmt.Errorf("pin programs and maps in %s: it is on no bpffs", dir)
	}
	return nil
}

func isBPF(path string) bool {
	var s unix.Statfs_t
	return unix.Statfs(path, &s) == nil && s.Type == unix.BPF_FS_MAGIC
}

// IsSame says whether two programs have the same instructions and the same maps.
func IsSame(a, b *ebpf.Program) (bool, error) {
	x, err := a.Info()
	if err != nil {
		return false, err
	}
	y, err := b.Info()
	if err != nil {
		return false, err
	}
	mapsA, _ := x.MapIDs()
	mapsB, _ := y.MapIDs()
	slices.Sort(mapsA)
	slices.Sort(mapsB)
	return x.Tag == y.Tag && slices.Equal(mapsA, mapsB), nil
}

// IgnoreMissing returns the error of a deletion from a map, and nil if the key was not there.
func IgnoreMissing(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// Difference is something that the kernel does not hold as the plan says.
type Difference struct {
	What       string // such as "pod 10.244.1.7"
	Want, Have string // empty for none
}

func (d Difference) String() string {
	switch {
	case d.Have == "":
		return fmt.Sprintf("%s is missing (%s)", d.What, d.Want)
	case d.Want == "":
		return fmt.Sprintf("%s is there and should not be (%s)", d.What, d.Have)
	}
	return fmt.Sprintf("%s: want %s, have %s", d.What, d.Want, d.Have)
}

// Compare returns the differences between what is wanted and what is there, in no order. what names a key, and value
// writes a value.
func Compare[K, V comparable](want, have map[K]V, what func(K) string, value func(V) string) []Difference {
	var d []Difference
	for k, w := range want {
		if h, there := have[k]; !there {
			d = append(d, Difference{What: what(k), Want: value(w)})
		} else if h != w {
			d = append(d, Difference{What: what(k), Want: value(w), Have: value(h)})
		}
	}
	for k := range maps.Keys(have) {
		if _, wanted := want[k]; !wanted {
			d = append(d, Difference{What: what(k), Have: value(have[k])})
		}
	}
	return d
}
