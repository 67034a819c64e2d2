package cgroup

import "testing"

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
