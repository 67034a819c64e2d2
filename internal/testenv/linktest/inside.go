package linktest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/testenv"
)

// Surroundings are what a test has to itself that Inside runs: the network namespace is that of the process.
type Surroundings struct {
	BPFFS  string // an empty bpffs
	Cgroup string // the directory of the cgroup v2 that the process is in
}

const (
	insideBPFFS  = "FATHOM_TEST_BPFFS"
	insideCgroup = "FATHOM_TEST_CGROUP"
	// insideProfile is set by a person who wants to know where a benchmark's time goes: a file for Go's profile.
	insideProfile = "FATHOM_BENCH_PROFILE"
)

// Inside runs the test or benchmark once more, in a process with a network namespace, a cgroup and a bpffs of its own: what
// is attached to a cgroup counts for whole processes. In that process it returns what these are, and true. In the first one it
// returns false after the second has ended; how that ended is how the test ends. prepare is given the namespace before.
func Inside(t testing.TB, prepare func(testing.TB, *link.Namespace)) (Surroundings, bool) {
	t.Helper()
	if bpffs := os.Getenv(insideBPFFS); bpffs != "" {
		return Surroundings{BPFFS: bpffs, Cgroup: os.Getenv(insideCgroup)}, true
	}
	testenv.NeedRoot(t)
	name, _, _ := strings.Cut(t.Name(), "/")
	group := fmt.Sprintf("fathom-test-%d-%s", os.Getpid(), name)
	testenv.Must(t, cgroup.Create(group))
	t.Cleanup(func() { testenv.Must(t, cgroup.Remove(group)) })
	dir, err := cgroup.Open(group)
	testenv.Must(t, err)
	if dir == nil {
		t.Skip("needs a cgroup v2 hierarchy")
	}
	defer dir.Close()
	n := Namespace(t)
	prepare(t, n)
	bpffs := t.TempDir()
	testenv.Must(t, unix.Mount("bpf", bpffs, "bpf", 0, ""))
	t.Cleanup(func() { testenv.Must(t, unix.Unmount(bpffs, unix.MNT_DETACH)) })
	args := []string{"-test.v", "-test.run=^" + name + "$"}
	_, bench := t.(*testing.B)
	if bench {
		args = []string{"-test.run=^$", "-test.bench=^" + name + "$", "-test.benchtime=1x"}
		if profile := os.Getenv(insideProfile); profile != "" {
			args = append(args, "-test.cpuprofile="+profile)
		}
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), insideBPFFS+"="+bpffs, insideCgroup+"="+dir.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	testenv.Must(t, n.Start(cmd))
	switch err := cmd.Wait(); {
	case err != nil:
		t.Errorf("%v\n%s", err, out.String())
	case strings.Contains(out.String(), "--- SKIP"):
		t.Skip(out.String())
	case bench:
		fmt.Print(out.String()) // what a benchmark logs is cut
	}
	return Surroundings{}, false
}
