// Package enclosed runs a benchmark in mount, network and PID namespaces of its own, which end with it, whatever ends it.
package enclosed

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// inside is in the environment of the process that runs in the namespaces, and is the benchmark's directory.
const inside = "FATHOM_BENCH_DIR"

// Mount is a file system that the namespaces have beside /proc and that of BPF.
type Mount struct{ At, Kind string }

// Main is the main function of a program that is a benchmark: it runs the program again in namespaces, and measure there, with a directory
// that is removed afterwards. If measure fails, it says so under the program's name, and exits with 1.
func Main(name string, mounts []Mount, measure func(ctx context.Context, dir string) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if dir := os.Getenv(inside); dir != "" {
		if err = mount(mounts); err == nil {
			err = measure(ctx, dir)
		}
	} else {
		err = enter(ctx, name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		os.Exit(1)
	}
}

// enter runs the program again in namespaces. The end of the first process of a PID namespace is the end of all of
// them, and then nobody holds the other namespaces, the mounts and what is pinned there.
func enter(ctx context.Context, name string) error {
	dir, err := os.MkdirTemp("", "fathom-bench-"+name+"-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"="+dir)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	return cmd.Run()
}

func mount(more []Mount) error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts from spreading: %w", err)
	}
	for _, m := range append([]Mount{{"/proc", "proc"}, {"/sys/fs/bpf", "bpf"}}, more...) {
		if err := unix.Mount(m.Kind, m.At, m.Kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.Kind, m.At, err)
		}
	}
	return nil
}
