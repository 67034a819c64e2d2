package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"github.com/fathom-network/fathom/internal/kernel/bpf/work"
	"github.com/fathom-network/fathom/internal/lab"
)

// timings is the value of the flag --timings.
type timings string

// The values of the flag.
const (
	timingsOff   timings = ""
	timingsSteps timings = "steps"
	timingsDeep  timings = "deep"
)

func (t *timings) flag(f *pflag.FlagSet) {
	f.Var(t, "timings", "end with a timeline of the steps; --timings=deep adds what each program of the nodes costs")
	f.Lookup("timings").NoOptDefVal = string(timingsSteps)
}

// String implements pflag.Value.
func (t *timings) String() string { return string(*t) }

// Type implements pflag.Value. Help shows flags of the type bool without a value that has to follow.
func (t *timings) Type() string { return "bool" }

// Set implements pflag.Value.
func (t *timings) Set(s string) error {
	switch timings(s) {
	case timingsSteps, timingsDeep:
		*t = timings(s)
		return nil
	}
	return fmt.Errorf("%q: want --timings or --timings=deep", s)
}

// costs begins to count what the lab's programs cost, and returns what prints it.
func (t timings) costs(name string) (print func(io.Writer) error, end func(), err error) {
	if t != timingsDeep {
		return func(io.Writer) error { return nil }, func() {}, nil
	}
	w, err := lab.CountWork(name)
	if err != nil {
		return nil, nil, err
	}
	return func(out io.Writer) error {
		all, err := w.Read()
		if err != nil {
			return err
		}
		printCosts(out, all, w.Missing())
		return nil
	}, w.Close, nil
}

// printCosts writes a row for each program and one for all.
func printCosts(out io.Writer, all []work.Program, missing []string) {
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "\nCPU\texecs\tprocesses\tthreads\tsystem calls\tpage faults\t  program\n")
	row := func(p work.Program) {
		fmt.Fprintf(t, "%.3f s\t%d\t%d\t%d\t%d\t%d\t  %s\n", p.CPU.Seconds(), p.Execs, p.Processes, p.Threads, p.Syscalls, p.Faults, p.Name)
	}
	sum := work.Program{Name: "all"}
	for _, p := range all {
		row(p)
		sum.CPU += p.CPU
		sum.Execs += p.Execs
		sum.Processes += p.Processes
		sum.Threads += p.Threads
		sum.Syscalls += p.Syscalls
		sum.Faults += p.Faults
	}
	row(sum)
	t.Flush()
	if len(missing) > 0 {
		fmt.Fprintf(out, "This kernel lacks the tracepoints %s: what they count is zero.\n", strings.Join(missing, ", "))
	}
}
