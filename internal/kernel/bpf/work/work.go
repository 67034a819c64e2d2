// Package work counts what the processes of a cgroup cost, by program: processor time, processes, threads, execs, system calls and
// page faults. Processes that have ended are counted, too, however short their lives were.
package work

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/fathom-network/fathom/internal/kernel/bpf"
)

// Program is what all processes of one name have cost. A process has the name of its program's file, or the one that it gave
// itself, cut to 15 bytes.
type Program struct {
	Name      string
	CPU       time.Duration
	Processes uint64 // that it started
	Threads   uint64 // that it started, besides the first of each process
	Execs     uint64 // by which processes became this program
	Syscalls  uint64
	Faults    uint64 // of pages, whether they needed the disk or not
}

// Counter counts from Open to Close.
type Counter struct {
	objects bpfObjects
	links   []link.Link
	missing []string
}

// Open begins to count the processes in the cgroup, which is a directory of cgroup v2, and in those below it. If the kernel
// cannot count at all, the error is a *bpf.UnsupportedError.
func Open(cgroup *os.File) (*Counter, error) {
	c := &Counter{}
	if err := loadBpfObjects(&c.objects, nil); err != nil {
		if errors.Is(err, ebpf.ErrNotSupported) {
			return nil, unsupported("programs at raw tracepoints (CONFIG_BPF_EVENTS)")
		}
		return nil, fmt.Errorf("load the programs that count the work of processes: %w", err)
	}
	if err := c.begin(cgroup); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func unsupported(missing ...string) error {
	return &bpf.UnsupportedError{Without: "the work of programs is not counted", Missing: missing, Instead: "--timings without =deep has the times of the steps"}
}

func (c *Counter) begin(cgroup *os.File) error {
	if err := c.objects.FathomGroup.Put(uint32(0), uint32(cgroup.Fd())); err != nil {
		return fmt.Errorf("count the processes of %s: %w", cgroup.Name(), err)
	}
	for name, program := range map[string]*ebpf.Program{
		"sys_enter":          c.objects.FathomSysEnter,
		"page_fault_user":    c.objects.FathomPageFaultUser, // not on every architecture
		"page_fault_kernel":  c.objects.FathomPageFaultKernel,
		"sched_process_exec": c.objects.FathomSchedProcessExec,
		"task_newtask":       c.objects.FathomTaskNewtask,
		"sched_switch":       c.objects.FathomSchedSwitch,
	} {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: name, Program: program})
		switch {
		case errors.Is(err, fs.ErrNotExist):
			c.missing = append(c.missing, name)
		case err != nil:
			return fmt.Errorf("count at the tracepoint %s: %w", name, err)
		default:
			c.links = append(c.links, l)
		}
	}
	slices.Sort(c.missing)
	if len(c.links) == 0 {
		return unsupported("tracepoints " + strings.Join(c.missing, ", "))
	}
	return nil
}

// Missing returns the tracepoints that the kernel does not have: what they would count is zero.
func (c *Counter) Missing() []string { return c.missing }

// Read returns what was counted so far, the most processor time first. Threads that run at this moment lack the time since they
// got their processor.
func (c *Counter) Read() ([]Program, error) {
	var all []Program
	var name bpfName
	var counts []bpfCounts
	entries := c.objects.FathomCounts.Iterate()
	for entries.Next(&name, &counts) {
		text, _, _ := bytes.Cut(name.Comm[:], []byte{0})
		p := Program{Name: string(text)}
		for _, of := range counts { // a processor each
			p.CPU += time.Duration(of.Nanoseconds)
			p.Processes += of.Processes
			p.Threads += of.Threads
			p.Execs += of.Execs
			p.Syscalls += of.Syscalls
			p.Faults += of.Faults
		}
		all = append(all, p)
	}
	if err := entries.Err(); err != nil {
		return nil, fmt.Errorf("read what programs have cost: %w", err)
	}
	slices.SortFunc(all, func(a, b Program) int { return cmp.Or(cmp.Compare(b.CPU, a.CPU), cmp.Compare(a.Name, b.Name)) })
	return all, nil
}

// Close ends the counting.
func (c *Counter) Close() {
	for _, l := range c.links {
		l.Close()
	}
	c.objects.Close()
}
