package main

import (
	"bytes"
	"io"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/fathom-network/fathom/internal/kernel/bpf/work"
)

func TestTimingsFlag(t *testing.T) {
	for _, c := range []struct {
		args []string
		want timings
		bad  bool
	}{
		{args: nil, want: timingsOff},
		{args: []string{"--timings"}, want: timingsSteps},
		{args: []string{"--timings=steps"}, want: timingsSteps},
		{args: []string{"--timings=deep"}, want: timingsDeep},
		{args: []string{"--timings=true"}, bad: true},
		{args: []string{"--timings="}, bad: true},
	} {
		var have timings
		f := pflag.NewFlagSet("up", pflag.ContinueOnError)
		f.SetOutput(io.Discard)
		have.flag(f)
		err := f.Parse(c.args)
		if (err != nil) != c.bad || err == nil && have != c.want {
			t.Errorf("%q: %q, %v; want %q", c.args, have, err, c.want)
		}
	}
}

func TestPrintCosts(t *testing.T) {
	var b bytes.Buffer
	printCosts(&b, []work.Program{
		{Name: "kube-apiserver", CPU: 2331 * time.Millisecond, Execs: 1, Threads: 14, Syscalls: 41233, Faults: 60112},
		{Name: "runc", CPU: 412 * time.Millisecond, Execs: 44, Processes: 21, Threads: 190, Syscalls: 9000, Faults: 12000},
	}, []string{"page_fault_user"})
	const want = `
      CPU  execs  processes  threads  system calls  page faults  program
  2.331 s      1          0       14         41233        60112  kube-apiserver
  0.412 s     44         21      190          9000        12000  runc
  2.743 s     45         21      204         50233        72112  all
This kernel lacks the tracepoints page_fault_user: what they count is zero.
`
	if b.String() != want {
		t.Errorf("have:\n%s\nwant:\n%s", b.String(), want)
	}
}
