// Command policies measures what NetworkPolicies cost, in one run: in namespaces that it makes there are pairs of nodes, each with the real
// agent, the real plugin and real pods, and a real API server of the kit's. What differs between the pairs is how many policies there are,
// whether the fast path is on, and who enforces them: Fathom, chains as kube-router lays them, or kube-network-policies. The pairs take turns
// of some milliseconds, and what counts are ratios to the pair that has no policies.
//
//	go run ./bench/policies                            # all, some minutes
//	go run ./bench/policies -rounds 3 -changes 10      # a look
//
// Nothing stays: all is in mount, network and PID namespaces that end with the program.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/bench/report"
)

// options are what to measure.
type options struct {
	kit, bin, other string
	rounds          int
	slice           time.Duration
	changes, starts int
	measures        string
	only            string
}

// inside is in the environment of the process that runs in namespaces of its own, and is their directory.
const inside = "FATHOM_POLICYBENCH_DIR"

func main() {
	var o options
	flag.StringVar(&o.kit, "kit", "bin/kit", "the kit's `directory`")
	flag.StringVar(&o.bin, "bin", "bin", "the `directory` of Fathom's programs")
	flag.StringVar(&o.other, "kube-network-policies", "bin/tools/kube-network-policies", "the `program` of that name; without, it is left out")
	flag.IntVar(&o.rounds, "rounds", 40, "how many `rounds` of packets")
	flag.DurationVar(&o.slice, "slice", 25*time.Millisecond, "for what `duration` each way is measured at a time")
	flag.IntVar(&o.changes, "changes", 50, "how many `changes` of labels, and of a policy; a fifth with 10,000 policies")
	flag.IntVar(&o.starts, "starts", 3, "how many `starts` with an empty kernel")
	flag.StringVar(&o.measures, "measures", "RR,CRR,CRR-1CPU,STREAM", "take these `measures` of each way, with commas between")
	flag.StringVar(&o.only, "only", "", "measure these `ways` alone, with commas between, by the name and number of their row: fathom/1000; those without policies are always there")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	run := enter
	if os.Getenv(inside) != "" {
		run = measure
	}
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "policies:", err)
		os.Exit(1)
	}
}

// enter runs the program again in namespaces. The end of the first process of a PID namespace is the end of all of
// them, and then nobody holds the other namespaces, the mounts and what is pinned there.
func enter(ctx context.Context, o options) error {
	dir, err := os.MkdirTemp("", "fathom-policybench-")
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

func measure(ctx context.Context, o options) error {
	for _, path := range []*string{&o.kit, &o.bin, &o.other} {
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = absolute
	}
	for _, m := range []struct{ what, at, kind string }{{"none", "/", ""}, {"proc", "/proc", "proc"}, {"bpf", "/sys/fs/bpf", "bpf"}, {"run", "/run", "tmpfs"}} {
		flags := uintptr(0)
		if m.kind == "" {
			flags = unix.MS_REC | unix.MS_PRIVATE
		}
		if err := unix.Mount(m.what, m.at, m.kind, flags, ""); err != nil {
			return fmt.Errorf("mount %s at %s: %w", m.what, m.at, err)
		}
	}
	load, _ := os.ReadFile("/proc/loadavg")
	b := &bench{options: o, dir: os.Getenv(inside)}
	defer b.end()
	if err := b.begin(ctx); err != nil {
		return err
	}
	if err := b.measureTraffic(ctx); err != nil {
		return err
	}
	header := []string{"WHERE", "WAY", "POLICIES"}
	for _, m := range b.wanted() {
		header = append(header, m.Name)
	}
	rows, missed := b.trafficRows()
	fmt.Print(report.Table(header, rows))
	fmt.Println()
	if err := b.measureWork(ctx); err != nil {
		return err
	}
	rows, more := b.workRows()
	fmt.Print(report.Table([]string{"WAY", "POLICIES", "START", "START-CPU", "LABEL-P50", "LABEL-P99", "POLICY-P50", "POLICY-P99", "CHANGE-CPU", "RSS"}, rows))
	var name unix.Utsname
	_ = unix.Uname(&name)
	fmt.Printf("\n%s, Linux %s, %d processors, a load of %s when it began, %d rounds of %v, %d changes\n", time.Now().UTC().Format(time.DateOnly),
		unix.ByteSliceToString(name.Release[:]), runtime.NumCPU(), strings.Fields(string(load) + " ?")[0], o.rounds, o.slice, o.changes)
	for _, n := range b.notes {
		fmt.Println(n)
	}
	for _, m := range append(missed, more...) {
		fmt.Println("missed:", m)
	}
	return nil
}
