package cgroup

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fathom-network/fathom/internal/testenv"
)

func TestParseMounts(t *testing.T) {
	for _, tc := range []struct {
		name, mounts string
		mode         Mode
		options      []string
	}{
		{"v2", "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid,nodev,noexec,relatime,nsdelegate 0 0\n", V2, []string{""}},
		{"hybrid", "cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu,cpuacct 0 0\n" +
			"cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,release_agent=/x,name=systemd 0 0\n" +
			"cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n", Hybrid, []string{"cpu,cpuacct", "name=systemd", ""}},
		{"v1, one mounted twice", "cgroup /a cgroup rw,memory 0 0\ncgroup /b cgroup rw,memory 0 0\n", V1, []string{"memory"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			all, mode, err := parseMounts(tc.mounts)
			if err != nil {
				t.Fatal(err)
			}
			if mode != tc.mode || len(all) != len(tc.options) {
				t.Fatalf("mode %s, hierarchies %+v; want %s with %q", mode, all, tc.mode, tc.options)
			}
			for i, h := range all {
				if h.Options != tc.options[i] {
					t.Errorf("hierarchy %d has options %q, want %q", i, h.Options, tc.options[i])
				}
			}
		})
	}
	if _, _, err := parseMounts("proc /proc proc rw 0 0\n"); err == nil {
		t.Error("a machine without cgroups gives no error")
	}
}

// TestNest has a child nest itself as a machine's init does: it must end up below, and the controllers must be there
// for another group below, which takes a process.
func TestNest(t *testing.T) {
	testenv.NeedRoot(t)
	all, mode, err := Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	group := fmt.Sprintf("fathom-test-nest-%d", os.Getpid())
	if mode != V2 {
		if err := Nest(group, "init"); err == nil {
			t.Error("Nest gives no error where v1 has the controllers")
		}
		t.Skip("needs cgroup v2 alone: test/vm has it")
	}
	t.Cleanup(func() {
		if err := Remove(group); err != nil {
			t.Error(err)
		}
	})
	if err := Create(group); err != nil {
		t.Fatal(err)
	}
	child := exec.Command("/proc/self/exe", "-test.run=^TestNestChild$", "-test.v")
	child.Env = append(os.Environ(), "FATHOM_TEST_GROUP="+group)
	if out, err := child.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	dir := filepath.Join(all[0].Path, group)
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"cpu", "cpuset", "memory", "pids"} {
		if !slices.Contains(strings.Fields(string(have)), c) {
			t.Errorf("groups below cannot use %s: there is %s", c, have)
		}
	}
}

func TestNestChild(t *testing.T) {
	group := os.Getenv("FATHOM_TEST_GROUP")
	if group == "" {
		t.Skip("is started by TestNest")
	}
	pod := filepath.Join(group, "pod")
	if err := Enter(group); err != nil {
		t.Fatal(err)
	}
	if err := Nest(group, "init"); err != nil {
		t.Fatal(err)
	}
	where, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || string(where) != "0::/"+group+"/init\n" {
		t.Errorf("after Nest the process is in %q, %v", where, err)
	}
	if err := Create(pod); err != nil {
		t.Fatal(err)
	}
	if err := Enter(pod); err != nil {
		t.Error(err)
	}
}

func TestSetCPUWeight(t *testing.T) {
	testenv.NeedRoot(t)
	group := fmt.Sprintf("fathom-test-weight-%d", os.Getpid())
	t.Cleanup(func() {
		if err := Remove(group); err != nil {
			t.Error(err)
		}
	})
	if err := Create(group); err != nil {
		t.Fatal(err)
	}
	all, mode, err := Hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for times, want := range map[int][2]string{3: {"3072", "300"}, 500: {"262144", "10000"}} {
		if err := SetCPUWeight(group, times); err != nil {
			t.Fatal(err)
		}
		for _, h := range all {
			for i, file := range []string{"cpu.shares", "cpu.weight"} {
				have, err := os.ReadFile(filepath.Join(h.Path, group, file))
				if err == nil && (mode == V2) == (i == 1) && strings.TrimSpace(string(have)) != want[i] {
					t.Errorf("%d times: %s of %s is %s, want %s", times, file, h.Path, have, want[i])
				}
			}
		}
	}
}
