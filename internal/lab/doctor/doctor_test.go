package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/testenv"
)

// fake returns an exam of a machine that has only the given files.
func fake(t *testing.T, files map[string]string) *exam {
	t.Helper()
	e := &exam{Options: Options{Clusters: 2, Nodes: 6}, host: host{root: t.TempDir(), release: "6.1.0", inotifyFree: func(want int) int { return want }}, now: time.Now()}
	for path, text := range files {
		path = e.host.path(path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// lines writes checks as "STATUS NAME".
func lines(checks []Check) string {
	var all []string
	for _, c := range checks {
		all = append(all, string(c.Status)+" "+c.Name)
	}
	return strings.Join(all, ", ")
}

func TestPureChecks(t *testing.T) {
	ctx := context.Background()
	tests := []struct {
		name  string
		files map[string]string
		run   func(e *exam)
		want  string // statuses and names
		text  string // is in what the checks found and advise
	}{
		{name: "new kernel", run: func(e *exam) { e.version("6.18.44-x") }, want: "ok version"},
		{name: "oldest kernel", run: func(e *exam) { e.version("5.14.0") }, want: "ok version"},
		{name: "old kernel", run: func(e *exam) { e.version("5.13.19") }, want: "fail version", text: "5.14 or later"},
		{name: "odd kernel", run: func(e *exam) { e.version("Plan 9") }, want: "warn version"},
		{name: "kernel without patch level", run: func(e *exam) { e.version("6.0+") }, want: "ok version"},
		{name: "clock", run: func(e *exam) { e.clock(e.now.Unix()) }, want: "ok clock"},
		{name: "clock never set", run: func(e *exam) { e.now = time.Unix(0, 0); e.clock(0) }, want: "fail clock", text: "1970-01-01"},
		{name: "clock before kit", run: func(e *exam) { e.clock(e.now.Add(48 * time.Hour).Unix()) }, want: "fail clock"},
		{name: "all capabilities", run: func(e *exam) { e.capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n") }, want: "ok capabilities"},
		{name: "no SYS_RESOURCE", run: func(e *exam) { e.capabilities("CapEff:\t000001fffeffffff\n") }, want: "warn CAP_SYS_RESOURCE"},
		{name: "no SYS_RESOURCE, quick", run: func(e *exam) { e.Quick = true; e.capabilities("CapEff:\t000001fffeffffff\n") }, want: "ok capabilities"},
		{name: "a plain container", run: func(e *exam) { e.capabilities("CapEff:\t00000000a80425fb\n") },
			want: "fail CAP_SYS_ADMIN, fail CAP_NET_ADMIN, warn CAP_SYS_PTRACE, warn CAP_SYS_RESOURCE", text: "--privileged"},
		{name: "no namespaces", run: (*exam).namespaces, want: "fail namespaces", text: "net, mnt, pid"},
		{name: "namespaces", files: nsFiles(""), run: (*exam).namespaces, want: "ok namespaces"},
		{name: "few namespaces", files: nsFiles("100"), run: (*exam).namespaces, want: "warn namespaces", text: "sysctl -w user.max_net_namespaces=16384"},
		{name: "namespaces forbidden", files: nsFiles("0"), run: (*exam).namespaces, want: "fail namespaces"},
		{name: "limits", files: map[string]string{
			"/proc/sys/fs/inotify/max_user_instances": "100", "/proc/sys/kernel/pid_max": "32768",
			"/proc/swaps": "Filename Type\n/dev/sdb partition\n", "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1048576 kB\n",
		}, run: func(e *exam) { e.limits(ctx); e.checks = dropped(e.checks, "open files") },
			want: "ok fs.inotify.max_user_instances, warn memory, ok kernel.pid_max, warn swap",
			text: "1.0 GiB available; 2 clusters with 6 nodes need about 2.0 GiB"},
		{name: "enough", files: map[string]string{"/proc/swaps": "Filename Type", "/proc/meminfo": "MemAvailable: 8388608 kB"},
			run: func(e *exam) { e.limits(ctx); e.checks = dropped(e.checks, "open files") }, want: "ok fs.inotify.max_user_instances, ok memory, ok swap"},
		{name: "inotify used up", files: map[string]string{"/proc/sys/fs/inotify/max_user_instances": "128"},
			run:  func(e *exam) { e.host.inotifyFree = func(int) int { return 30 }; e.inotify() },
			want: "fail fs.inotify.max_user_instances", text: "sysctl -w fs.inotify.max_user_instances=1024"},
		{name: "full disk", run: func(e *exam) { e.space("/x", 1<<30) }, want: "fail disk"},
		{name: "little disk", run: func(e *exam) { e.space("/x", 5<<30) }, want: "warn disk"},
		{name: "disk", run: func(e *exam) { e.space("/x", 50<<30) }, want: "ok disk"},
		{name: "cgroup v2", files: map[string]string{"/cg/cgroup.controllers": "cpuset cpu io memory hugetlb pids"},
			run:  func(e *exam) { e.controllers(cgroup.V2, []cgroup.Hierarchy{{Path: "/cg", V2: true}}) },
			want: "ok controllers", text: "cpu, cpuset, memory, pids, io, hugetlb"},
		{name: "cgroup v2 in a container", files: map[string]string{"/cg/cgroup.controllers": "cpuset cpu io memory hugetlb pids",
			"/cg/cgroup.type": "domain", "/cg/cgroup.procs": "1\n17\n", "/cg/cgroup.subtree_control": ""},
			run:  func(e *exam) { e.controllers(cgroup.V2, []cgroup.Hierarchy{{Path: "/cg", V2: true}}) },
			want: "ok controllers, fail delegation", text: "/cg/init/cgroup.procs"},
		{name: "cgroup v2 in a container with init", files: map[string]string{"/cg/cgroup.controllers": "cpuset cpu io memory hugetlb pids",
			"/cg/cgroup.type": "domain", "/cg/cgroup.procs": "", "/cg/cgroup.subtree_control": "cpu memory"},
			run:  func(e *exam) { e.controllers(cgroup.V2, []cgroup.Hierarchy{{Path: "/cg", V2: true}}) },
			want: "ok controllers"},
		{name: "cgroup v2 lacks memory", files: map[string]string{
			"/cg/cgroup.controllers": "cpuset cpu io pids", "/proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\nhugetlb\t0\t1\t1\n"},
			run:  func(e *exam) { e.controllers(cgroup.V2, []cgroup.Hierarchy{{Path: "/cg", V2: true}}) },
			want: "fail cgroup memory, warn cgroup hugetlb, ok controllers", text: "cgroup_enable=memory"},
		{name: "br_netfilter", files: map[string]string{"/proc/sys/net/bridge/bridge-nf-call-iptables": "1"},
			run: (*exam).bridgeFilter, want: "ok br_netfilter", text: "available"},
		{name: "br_netfilter not loaded", files: map[string]string{"/lib/modules/6.1.0/modules.dep": "kernel/net/bridge/br_netfilter.ko: kernel/net/bridge/bridge.ko\n"},
			run: func(e *exam) { e.NeedBridgeFilter = true; e.bridgeFilter() }, want: "ok br_netfilter", text: "fathom up"},
		{name: "no br_netfilter", run: (*exam).bridgeFilter, want: "warn br_netfilter", text: "by a Service"},
		{name: "no br_netfilter for flannel", run: func(e *exam) { e.NeedBridgeFilter = true; e.bridgeFilter() }, want: "fail br_netfilter"},
		{name: "cgroup v1", files: map[string]string{"/proc/cgroups": "pids 0 1 1\n"},
			run: func(e *exam) {
				var all []cgroup.Hierarchy
				for _, c := range []string{"cpu,cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "hugetlb"} {
					all = append(all, cgroup.Hierarchy{Path: "/cg/" + c, Options: c})
				}
				e.controllers(cgroup.V1, all)
			},
			want: "fail cgroup pids, ok controllers", text: "mount -t cgroup -o pids cgroup /sys/fs/cgroup/pids"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			e := fake(t, test.files)
			test.run(e)
			if got := lines(e.checks); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if text := fmt.Sprintf("%+v", e.checks); !strings.Contains(text, test.text) {
				t.Errorf("%q is not in %s", test.text, text)
			}
			for _, c := range e.checks {
				if c.Needed != (c.Status == Fail) && c.Status != OK {
					t.Errorf("%s is %s but needed is %t", c.Name, c.Status, c.Needed)
				}
			}
		})
	}
}

func nsFiles(limit string) map[string]string {
	files := map[string]string{}
	for _, kind := range []string{"net", "mnt", "pid", "uts", "ipc", "cgroup"} {
		files["/proc/self/ns/"+kind] = ""
		if limit != "" {
			files["/proc/sys/user/max_"+kind+"_namespaces"] = limit
		}
	}
	return files
}

func dropped(checks []Check, name string) []Check {
	var kept []Check
	for _, c := range checks {
		if c.Name != name {
			kept = append(kept, c)
		}
	}
	return kept
}

func TestModules(t *testing.T) {
	h := fake(t, map[string]string{"/lib/modules/6.1.0/modules.dep": "kernel/net/netfilter/ipvs/ip_vs.ko.xz: kernel/x.ko\nkernel/net/sched/sch-netem.ko:\n"}).host
	for name, want := range map[string]bool{"ip_vs": true, "sch_netem": true, "vs": false, "wireguard": false, "x": false} {
		if got := h.hasModule(name); got != want {
			t.Errorf("hasModule(%s) = %t", name, got)
		}
	}
	if got := h.kernelRemedy("wireguard"); !strings.Contains(got, "built without it") {
		t.Errorf("got %s", got)
	}
}

func TestWithout(t *testing.T) {
	for err, want := range map[error]string{
		unix.EOPNOTSUPP:             "not in this kernel: x",
		unix.EPERM:                  "not permitted here: x",
		errors.New("out of spirit"): "does not work here (out of spirit): x",
	} {
		if got := without(err, "x"); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

func TestFor(t *testing.T) {
	lab, err := topology.Default(topology.Overrides{ProxyMode: "ipvs", Network: "flannel"})
	if err != nil {
		t.Fatal(err)
	}
	lab.Clusters[1].Nodes[1].Wire.Delay = "1ms"
	want := Options{Clusters: 2, Nodes: 6, ControlPlanes: 2, NeedIPTables: true, NeedIPVS: true, NeedVXLAN: true, NeedBridgeFilter: true, NeedNetem: true}
	if got := For(lab); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if lab, err = topology.Default(topology.Overrides{}); err != nil {
		t.Fatal(err)
	}
	want = Options{Clusters: 2, Nodes: 6, ControlPlanes: 2}
	if got := For(lab); got != want {
		t.Errorf("the default lab: got %+v, want %+v", got, want)
	}
	lab.Clusters[1].Network.Mode = "vxlan"
	want.NeedVXLAN = true
	if got := For(lab); got != want {
		t.Errorf("mode vxlan in one cluster: got %+v, want %+v", got, want)
	}
}

func TestReport(t *testing.T) {
	checks := []Check{
		{Name: "root", Category: rights, Status: OK, Found: "running as root", Needed: true},
		{Name: "veth", Category: links, Status: Fail, Found: "not in this kernel: nodes cannot be wired", Remedy: "modprobe veth", Needed: true},
		{Name: "IPv4 forwarding", Category: links, Status: Warn, Found: "off", Remedy: "sysctl -w net.ipv4.ip_forward=1"},
	}
	var b bytes.Buffer
	if err := Write(&b, checks, true); err != nil {
		t.Fatal(err)
	}
	const want = `RIGHTS
  ok    root             running as root

NETWORK
  fail  veth             not in this kernel: nodes cannot be wired
                         -> modprobe veth
  warn  IPv4 forwarding  off
                         -> sysctl -w net.ipv4.ip_forward=1

1 ok, 1 warn, 1 fail: a lab does not start here until the failures are fixed
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	const wantErr = `this machine lacks one thing that the lab needs (fathom doctor reports the rest):
  - veth: not in this kernel: nodes cannot be wired
      modprobe veth`
	if err := Failed(checks); err == nil || err.Error() != wantErr {
		t.Errorf("got\n%v\nwant\n%s", err, wantErr)
	}
	if err := Failed(checks[:1]); err != nil {
		t.Errorf("got %v, want no error", err)
	}
	data, err := json.Marshal(checks[1])
	if err != nil || !strings.Contains(string(data), `"status":"fail"`) {
		t.Errorf("got %s, %v", data, err)
	}
}

// TestThisMachine runs everything for real and looks for what it may have left behind.
func TestThisMachine(t *testing.T) {
	testenv.NeedRoot(t)
	dir := t.TempDir()
	// Other tests may mount and make devices meanwhile: what counts is what could be ours.
	ours := func() int {
		return countLines(t, "/proc/self/mountinfo", dir) + countLines(t, "/proc/net/dev", "doctor")
	}
	before := ours()
	for _, quick := range []bool{false, true} {
		start := time.Now()
		checks := Run(context.Background(), Options{StateDir: filepath.Join(dir, "not", "yet"), NeedNFTables: true, Quick: quick})
		t.Logf("quick %t: %d checks in %s", quick, len(checks), time.Since(start))
		var b bytes.Buffer
		if err := Write(&b, checks, true); err != nil {
			t.Fatal(err)
		}
		t.Log("\n" + b.String())
		names := map[string]bool{}
		for _, c := range checks {
			if names[c.Name] {
				t.Errorf("two checks are named %s", c.Name)
			}
			names[c.Name] = true
			if c.Found == "" || c.Status == Fail && c.Remedy == "" {
				t.Errorf("%+v says too little", c)
			}
			if quick && c.Status == Warn {
				t.Errorf("%+v cannot fail and took time", c)
			}
		}
	}
	if n := ours(); n != before {
		t.Errorf("%d mounts and devices before, %d after", before, n)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// countLines counts the lines of a file that have the word in them.
func countLines(t *testing.T, path, word string) int {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, word) {
			n++
		}
	}
	return n
}
