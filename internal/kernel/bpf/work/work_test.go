package work

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/testenv"
)

// TestCounter has a shell in a cgroup start a program twenty times, and the same shell beside the cgroup, which must not count.
func TestCounter(t *testing.T) {
	testenv.NeedRoot(t)
	group := fmt.Sprintf("fathom-test-work-%d", os.Getpid())
	t.Cleanup(func() {
		if err := cgroup.Remove(group); err != nil {
			t.Error(err)
		}
	})
	if err := cgroup.Create(group); err != nil {
		t.Fatal(err)
	}
	dir, err := cgroup.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	if dir == nil {
		t.Skip("this machine has no cgroup v2")
	}
	defer dir.Close()
	c, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	const script = `i=0; while [ $i -lt 20 ]; do /bin/cat /proc/self/comm; i=$((i+1)); done`
	for _, inside := range []bool{true, false} {
		shell := exec.Command("/bin/sh", "-c", script)
		if inside {
			shell.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
		}
		if err := shell.Run(); err != nil {
			t.Fatal(err)
		}
	}

	all, err := c.Read()
	if err != nil {
		t.Fatal(err)
	}
	of := func(name string) Program {
		i := slices.IndexFunc(all, func(p Program) bool { return p.Name == name })
		if i < 0 {
			t.Fatalf("there is no %s among %+v", name, all)
		}
		return all[i]
	}
	shell, cat := of("sh"), of("cat")
	if shell.Processes != 20 || shell.Execs != 1 || shell.Threads != 0 {
		t.Errorf("sh started %d processes and %d threads, and was executed %d times; want 20, 0 and 1", shell.Processes, shell.Threads, shell.Execs)
	}
	if cat.Execs != 20 || cat.Processes != 0 {
		t.Errorf("cat was executed %d times, and started %d processes; want 20 and none", cat.Execs, cat.Processes)
	}
	// Each cat opens, reads and writes; each process touches pages and takes time.
	if cat.Syscalls < 20*3 || cat.CPU <= 0 || shell.CPU <= 0 {
		t.Errorf("cat made %d system calls in %v, sh took %v", cat.Syscalls, cat.CPU, shell.CPU)
	}
	if len(c.Missing()) == 0 && cat.Faults < 20 {
		t.Errorf("cat had %d page faults, want one for each process at least", cat.Faults)
	}
}
