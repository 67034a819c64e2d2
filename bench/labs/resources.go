package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A process is one of a node's, with what it costs.
type process struct {
	name string
	anon float64 // MB of anonymous memory
	cpu  float64 // seconds of processor time, without its children's
}

// processes returns the process and its descendants.
func processes(root int) ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		status, err := os.ReadFile(filepath.Join("/proc", e.Name(), "status"))
		if err != nil {
			continue // it ended meanwhile
		}
		parent, _ := strconv.Atoi(statusField(string(status), "PPid"))
		children[parent] = append(children[parent], pid)
	}
	var found []process
	for queue := []int{root}; len(queue) > 0; queue = queue[1:] {
		pid := queue[0]
		queue = append(queue, children[pid]...)
		p, err := readProcess(pid)
		if err == nil {
			found = append(found, p)
		}
	}
	return found, nil
}

// processesOf returns the processes of nodes.
func processesOf(nodes []machine) ([]process, error) {
	var all []process
	for _, m := range nodes {
		found, err := processes(m.Pid)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

func readProcess(pid int) (process, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return process{}, err
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return process{}, err
	}
	name, _, _ := strings.Cut(string(cmdline), "\x00")
	// One that has ended, or that is the kernel's, has none.
	kib, err := strconv.Atoi(strings.TrimSuffix(statusField(string(status), "RssAnon"), " kB"))
	if err != nil {
		return process{}, fmt.Errorf("process %d: no RssAnon: %w", pid, err)
	}
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return process{}, err
	}
	return process{name: filepath.Base(name), anon: float64(kib) * 1024 / 1e6, cpu: statSeconds(string(stat))}, nil
}

// statSeconds is the processor time in /proc/PID/stat, which the kernel tells in hundredths of a second. The
// second field is the program's name in parentheses, and may hold anything.
func statSeconds(stat string) float64 {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

// statusField is a field of /proc/PID/status.
func statusField(status, name string) string {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// memory is the anonymous memory by program, in MB; of a program that runs several times, the mean.
func memory(processes []process) map[string]float64 {
	sum, n := map[string]float64{}, map[string]float64{}
	for _, p := range processes {
		sum[p.name] += p.anon
		n[p.name]++
	}
	for name := range sum {
		sum[name] /= n[name]
	}
	return sum
}

// diskMB is what a directory takes on its disk, in MB. A file that has other links is shared, and costs this
// directory nothing.
func diskMB(dir string) (float64, error) {
	var root syscall.Stat_t
	if err := syscall.Lstat(dir, &root); err != nil {
		return 0, err
	}
	var blocks int64
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if os.IsNotExist(err) {
			return nil // removed while we look: the node runs
		}
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(path, &st); err != nil {
			return nil
		}
		if st.Dev != root.Dev {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if d.IsDir() || st.Nlink == 1 {
			blocks += st.Blocks
		}
		return nil
	})
	return float64(blocks) * 512 / 1e6, err
}

// pluginMB is what the CNI plugin takes that the agent's pod has copied to a node: each node has it for itself.
func pluginMB(dir string) (float64, error) {
	copies, err := filepath.Glob(filepath.Join(dir, "overlays/*/upper/bin/fathom-cni"))
	if err != nil {
		return 0, err
	}
	if len(copies) == 0 {
		return 0, fmt.Errorf("no CNI plugin among what pods have written below %s: is the network Fathom's?", dir)
	}
	var sum float64
	for _, path := range copies {
		mb, err := diskMB(path)
		if err != nil {
			return 0, err
		}
		sum += mb
	}
	return sum, nil
}
