package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/fathom-network/fathom/internal/testenv"
)

func TestParseKernel(t *testing.T) {
	for stat, want := range map[string]uint64{
		"anon 4096\nfile 0\nkernel 1650688\nkernel_stack 32768\n": 1650688,
		"kernel 7": 7,
	} {
		if n, known := parseKernel(stat); n != want || !known {
			t.Errorf("%q: %d, %v", stat, n, known)
		}
	}
	for _, stat := range []string{"", "anon 4096\nkernel_stack 32768\n", "kernel much\n"} {
		if n, known := parseKernel(stat); known {
			t.Errorf("%q: %d", stat, n)
		}
	}
}

func TestKernelMemory(t *testing.T) {
	testenv.NeedRoot(t)
	group := fmt.Sprintf("fathom-test-%d", os.Getpid())
	if err := Create(group); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := Remove(group); err != nil {
			t.Error(err)
		}
	}()
	before, known, err := KernelMemory(group)
	if err != nil || before > 1<<20 {
		t.Errorf("an empty group: %d, %v, %v", before, known, err)
	}
	// What a process of the group starts costs the kernel something: its stack, its page tables.
	shell := exec.Command("sh", "-c", "read line; sleep 60 & sleep 60")
	in, err := shell.StdinPipe()
	testenv.Must(t, err)
	dir, err := Open(group)
	testenv.Must(t, err)
	if dir != nil {
		defer dir.Close()
		shell.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	}
	testenv.Must(t, shell.Start())
	defer func() {
		testenv.Must(t, Kill(context.Background(), group))
		_ = shell.Wait() // says that it was killed
	}()
	testenv.Must(t, Add(group, shell.Process.Pid))
	_, err = in.Write([]byte("\n"))
	testenv.Must(t, err)
	if known {
		testenv.Eventually(t, "the group's processes cost the kernel memory", func() (bool, string) {
			n, _, err := KernelMemory(group)
			testenv.Must(t, err)
			return n > before, fmt.Sprint(n)
		})
	}
	if _, known, err := KernelMemory(group + "-none"); known || err != nil {
		t.Errorf("a group that is not there: %v, %v", known, err)
	}
}
