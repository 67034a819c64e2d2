package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/bench/report"
)

// describe tells what figures were taken with, and on what machine: what matters of it to whoever compares,
// and nothing that names it.
func describe(version string, rounds int, now time.Time) string {
	rows := [][]string{
		{"processors", strconv.Itoa(runtime.NumCPU())},
		{"memory", fmt.Sprintf("%.0f GiB", memTotal()/(1<<30))},
		{"Linux", kernel()},
		{"system", osName()},
		{"cgroups", cgroups()},
		{"fathom", fathomVersion(version)},
		{"rounds", strconv.Itoa(rounds)},
		{"load when it began", loadavg() + " processes (1 min mean)"},
		{"date", now.UTC().Format(time.DateOnly)},
	}
	return report.Table([]string{"the machine", ""}, rows)
}

// fathomVersion picks fathom's own line of what `fathom version` lists.
func fathomVersion(list string) string {
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "fathom" {
			return f[1]
		}
	}
	return "unknown"
}

func memTotal() float64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return float64(info.Totalram) * float64(info.Unit)
}

// kernel is the kernel's version without what its builder added to it.
func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	release := string(bytes.TrimRight(u.Release[:], "\x00"))
	version, _, _ := strings.Cut(release, "-")
	return version
}

func osName() string {
	data, _ := os.ReadFile("/etc/os-release")
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(strings.TrimSpace(value), `"`)
		}
	}
	return "unknown"
}

func cgroups() string {
	var fs unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return "v2"
	}
	if err := unix.Statfs("/sys/fs/cgroup/unified", &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return "v1, with v2 beside it (hybrid)"
	}
	return "v1"
}

func loadavg() string {
	data, _ := os.ReadFile("/proc/loadavg")
	load, _, _ := strings.Cut(string(data), " ")
	return load
}
