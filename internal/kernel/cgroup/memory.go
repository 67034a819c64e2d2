package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// KernelMemory returns how many bytes the kernel holds of its own for the processes of a group: BPF maps, packet rules,
// sockets, page tables (cgroup-v2.rst, "kernel" of memory.stat; on v1 memory.kmem.usage_in_bytes). What is pinned or set
// stays with the group of who made it. known is false where no memory controller counts it.
func KernelMemory(group string) (bytes uint64, known bool, err error) {
	all, _, err := Hierarchies()
	if err != nil {
		return 0, false, err
	}
	for _, h := range all {
		file, parse := "memory.kmem.usage_in_bytes", parseCount
		if h.V2 {
			file, parse = "memory.stat", parseKernel
		}
		data, err := os.ReadFile(filepath.Join(h.Path, group, file))
		if errors.Is(err, fs.ErrNotExist) { // another controller's hierarchy, or an older kernel
			continue
		}
		if err != nil {
			return 0, false, fmt.Errorf("read the memory of cgroup %s: %w", group, err)
		}
		if bytes, known = parse(string(data)); known {
			return bytes, true, nil
		}
	}
	return 0, false, nil
}

func parseCount(data string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimSpace(data), 10, 64)
	return n, err == nil
}

func parseKernel(stat string) (uint64, bool) {
	for line := range strings.Lines(stat) {
		if count, found := strings.CutPrefix(line, "kernel "); found {
			return parseCount(count)
		}
	}
	return 0, false
}
