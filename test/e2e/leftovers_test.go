package e2e

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// snapshot is what the host looks like, as records of each kind. Records of other labs, which may run at
// the same time, are not in it.
type snapshot map[string][]string

func cmdNothingLeft(ts *testscript.TestScript, neg bool, args []string) {
	s := sessionOf(ts)
	if neg || len(args) > 0 {
		ts.Fatalf("usage: nothing-left")
	}
	if d := s.leftovers(); d != "" {
		ts.Fatalf("the host is not as it was:\n%s", d)
	}
}

// leftovers tells what is not as it was before the scenario.
func (s *session) leftovers() string {
	now := takeSnapshot(s.lab, s.env.WorkDir)
	// A kernel module that came meanwhile brought its own.
	now["sysctls"] = slices.DeleteFunc(now["sysctls"], func(r string) bool {
		name, _, _ := strings.Cut(r, "=")
		return !slices.ContainsFunc(s.before["sysctls"], func(b string) bool { return strings.HasPrefix(b, name) })
	})
	d := s.before.diff(now)
	// A process that has ended holds nothing, but its number, until the host's own init collects it.
	for start := time.Now(); zombies(s.lab) > 0 && time.Since(start) < 5*time.Second; {
		time.Sleep(50 * time.Millisecond)
	}
	for start := time.Now(); len(shared(s.state)) > 0 && time.Since(start) < 3*time.Second; {
		time.Sleep(100 * time.Millisecond) // another lab may just be about to begin
	}
	if rest := shared(s.state); len(rest) > 0 {
		d += "empty directories of labs:\n  " + strings.Join(rest, "\n  ") + "\n"
	}
	if trace := traces(s.lab, s.state, s.alone || s.own != ""); len(trace) > 0 {
		d += "traces of the lab:\n  " + strings.Join(trace, "\n  ") + "\n"
	}
	return d
}

func (s snapshot) diff(now snapshot) string {
	var b strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(s)) {
		var lines []string
		for _, r := range now[kind] {
			if !slices.Contains(s[kind], r) {
				lines = append(lines, "  + "+r)
			}
		}
		for _, r := range s[kind] {
			if !slices.Contains(now[kind], r) {
				lines = append(lines, "  - "+r)
			}
		}
		if len(lines) > 0 {
			fmt.Fprintf(&b, "%s:\n%s\n", kind, strings.Join(lines, "\n"))
		}
	}
	return b.String()
}

// sysctls are those that Kubernetes' programs are known to set, and all of the network's switches.
var sysctls = []string{
	"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv4/conf/*/*", "/proc/sys/net/ipv6/conf/*/*",
	"/proc/sys/net/netfilter/*", "/proc/sys/net/bridge/*", "/proc/sys/net/core/*", "/proc/sys/net/ipv4/tcp_*",
	"/proc/sys/vm/overcommit_memory", "/proc/sys/vm/panic_on_oom", "/proc/sys/kernel/panic*", "/proc/sys/kernel/keys/*",
	"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/kernel/threads-max", "/proc/sys/kernel/pid_max",
	"/proc/sys/fs/inotify/*", "/proc/sys/fs/file-max", "/proc/sys/fs/nr_open",
}

// changing are sysctls that are counters.
var changing = regexp.MustCompile(`nf_conntrack_count|random|stat|flush|addr_gen_mode|stable_secret|tcp_fastopen_key`)

func takeSnapshot(lab, workDir string) snapshot {
	s := snapshot{
		"links":            others(lab, command("ip", "-o", "link", "show")),
		"addresses":        others(lab, strip(command("ip", "-o", "addr", "show"), `\s+(valid_lft|preferred_lft) \S+`)),
		"routes":           others(lab, strip(command("ip", "-4", "route", "show", "table", "all"), `\s+linkdown|cache`)),
		"IPv6 routes":      others(lab, strip(command("ip", "-6", "route", "show", "table", "all"), `\s+(expires \S+|linkdown)`)),
		"routing rules":    command("ip", "rule", "show"),
		"nft tables":       others(lab, command("nft", "list", "tables")),
		"iptables":         strip(command("iptables-save"), `^#.*|\[\d+:\d+\]`),
		"ip6tables":        strip(command("ip6tables-save"), `^#.*|\[\d+:\d+\]`),
		"named namespaces": glob("/run/netns/*", "/var/run/netns/*"),
		"mounts":           mounts(lab, workDir),
		"IP sets":          command("ipset", "list", "-n"),
		"cgroups":          others(lab, cgroups()),
		"files": append(others(lab, glob("/var/lib/fathom", "/var/lib/fathom/*", "/var/lib/fathom/*/*", "/run/fathom", "/run/fathom/*")),
			glob("/etc/cni/net.d/*", "/opt/cni/bin/*", "/etc/kubernetes/*", "/var/lib/kubelet/*", "/var/lib/containerd/*", "/var/lib/etcd/*",
				"/var/lib/cni/*", "/run/containerd/*", "/run/flannel/*", "/run/xtables.lock", "/var/log/pods/*", "/var/log/containers/*")...),
		"contents": contents("/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/machine-id"),
	}
	var values []string
	for _, file := range glob(sysctls...) {
		if changing.MatchString(file) || strings.Contains(file, "/conf/fa-") {
			continue
		}
		if data, err := os.ReadFile(file); err == nil {
			values = append(values, strings.TrimPrefix(file, "/proc/sys/")+" = "+strings.TrimSpace(string(data)))
		}
	}
	s["sysctls"] = values
	return s
}

// labName finds the lab that a record is of.
var labName = regexp.MustCompile(`fathom lab ([a-z0-9-]+)|inet fathom-([a-z0-9-]+)|/labs/([a-z0-9-]+)|/locks/([a-z0-9-]+)|/run/fathom/([a-z0-9-]+)|/fathom/([a-z0-9-]+)|\bfa-([a-z0-9-]+)`)

// others drops the records of other labs.
func others(lab string, records []string) []string {
	return slices.DeleteFunc(records, func(r string) bool {
		m := labName.FindStringSubmatch(r)
		if m == nil {
			// What labs share may come and go with another one; see shared.
			return strings.HasPrefix(r, "/var/lib/fathom") || strings.HasPrefix(r, "/run/fathom") || strings.HasSuffix(r, "/fathom")
		}
		name := strings.Join(m[1:], "")
		return name != lab
	})
}

// mounts are the host's, without those of other labs and below other scenarios' working directories.
func mounts(lab, workDir string) []string {
	all := filepath.Dir(workDir) + "/"
	return slices.DeleteFunc(others(lab, lines("/proc/self/mounts")), func(r string) bool {
		return strings.Contains(r, all) && !strings.Contains(r, workDir+"/")
	})
}

func command(name string, args ...string) []string {
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	cmd := exec.Command(path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		return []string{name + ": " + err.Error()} // the same before and after
	}
	return split(out)
}

func lines(file string) []string {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	return split(data)
}

func split(data []byte) []string {
	var all []string
	for line := range strings.Lines(string(data)) {
		all = append(all, strings.TrimSpace(line))
	}
	return all
}

func strip(records []string, pattern string) []string {
	re := regexp.MustCompile(pattern)
	for i, r := range records {
		records[i] = strings.TrimSpace(re.ReplaceAllString(r, ""))
	}
	return records
}

func glob(patterns ...string) []string {
	var all []string
	for _, p := range patterns {
		found, err := filepath.Glob(p)
		if err == nil {
			all = append(all, found...)
		}
	}
	return all
}

func contents(files ...string) []string {
	var all []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		all = append(all, fmt.Sprintf("%s %x %v", file, sha256.Sum256(data), err))
	}
	return all
}

// cgroups are the groups of labs and of Kubernetes, in all hierarchies. What else the host does is its own.
func cgroups() []string {
	var all []string
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // gone meanwhile
		}
		for _, word := range []string{"fathom", "kube", "k8s.io"} {
			if strings.Contains(path, word) {
				all = append(all, path)
				break
			}
		}
		return nil
	})
	return all
}

// shared are directories that all labs share, and that hold none: the last lab takes them with it.
func shared(state string) []string {
	all := glob(state+"/labs", state+"/locks", "/run/fathom", "/sys/fs/cgroup/fathom", "/sys/fs/cgroup/*/fathom")
	return slices.DeleteFunc(all, func(dir string) bool {
		entries, _ := os.ReadDir(dir)
		return slices.ContainsFunc(entries, func(e fs.DirEntry) bool {
			return e.IsDir() || !strings.HasPrefix(dir, "/sys/") // a cgroup's own files do not count
		})
	})
}

// zombies counts the processes of a lab that ended and that nobody has collected.
func zombies(lab string) int {
	n := 0
	for _, proc := range glob("/proc/[0-9]*") {
		status, _ := os.ReadFile(proc + "/status")
		groups, _ := os.ReadFile(proc + "/cgroup")
		if bytes.Contains(status, []byte("\nState:\tZ")) && bytes.Contains(groups, []byte("/fathom/"+lab+"/")) {
			n++
		}
	}
	return n
}

// traces finds processes and mounts of a lab, whatever namespace they are in. Processes that use the state's cache are
// this lab's if it is the only one.
func traces(lab, state string, only bool) []string {
	dir := []byte(state + "/labs/" + lab + "/")
	cache := []byte(state + "/cache/")
	group := []byte("/fathom/" + lab)
	run := []byte("/run/fathom/" + lab + "/")
	var all []string
	seen := map[string]bool{}
	for _, proc := range glob("/proc/[0-9]*") {
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil || pid == os.Getpid() {
			continue
		}
		line, _ := os.ReadFile(proc + "/cmdline")
		line = bytes.ReplaceAll(line, []byte{0}, []byte{' '})
		groups, _ := os.ReadFile(proc + "/cgroup")
		if bytes.Contains(append(groups, '\n'), append(group, '/')) || bytes.Contains(groups, append(group, '\n')) {
			all = append(all, fmt.Sprintf("process %d in the lab's cgroup: %s", pid, line))
		}
		if bytes.Contains(line, dir) || only && bytes.Contains(line, cache) {
			all = append(all, fmt.Sprintf("process %d: %s", pid, line))
		}
		for _, link := range []string{"exe", "cwd", "root"} {
			if to, err := os.Readlink(proc + "/" + link); err == nil && bytes.HasPrefix([]byte(to+"/"), dir) {
				all = append(all, fmt.Sprintf("process %d with %s %s: %s", pid, link, to, line))
			}
		}
		ns, err := os.Readlink(proc + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		mounts, _ := os.ReadFile(proc + "/mountinfo")
		for m := range bytes.Lines(mounts) {
			if bytes.Contains(m, dir) || bytes.Contains(m, run) {
				all = append(all, fmt.Sprintf("mount in %s of process %d (%s): %s", ns, pid, bytes.TrimSpace(line), bytes.TrimSpace(m)))
			}
		}
	}
	return all
}
