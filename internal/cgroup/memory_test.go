package cgroup

import (
	"fmt"
	"os"
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
	if n, known, err := KernelMemory(group); err != nil || n > 1<<20 {
		t.Errorf("an empty group: %d, %v, %v", n, known, err)
	}
	if _, known, err := KernelMemory(group + "-none"); known || err != nil {
		t.Errorf("a group that is not there: %v, %v", known, err)
	}
}
