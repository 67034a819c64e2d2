// Command pods measures the pod network beside others, in one run: in namespaces that it makes there are for each
// way one node with two pods, and two nodes with a pod each. Fathom's ways, the reference plugins' and flannel's take
// turns of some milliseconds, and what counts are ratios to a plain pair of devices between two namespaces, measured
// in between. The peers are the real programs of the kit, with the same rules on every node as a small kube-proxy has.
//
//	go run ./bench/pods                           # all, some minutes
//	go run ./bench/pods -rounds 3 -adds 10        # a look
//
// Nothing stays: all is in mount, network and PID namespaces that end with the program.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/bench/enclosed"
	"github.com/fathom-network/fathom/bench/report"
	"github.com/fathom-network/fathom/bench/traffic"
)

// options are what to measure.
type options struct {
	kit    string
	bin    string
	rounds int
	slice  time.Duration
	adds   int
	only   string

	measures string
}

func main() {
	var o options
	flag.StringVar(&o.kit, "kit", "bin/kit", "the kit's `directory`")
	flag.StringVar(&o.bin, "bin", "bin", "the `directory` of Fathom's programs")
	flag.IntVar(&o.rounds, "rounds", 60, "how many `rounds` of packets")
	flag.DurationVar(&o.slice, "slice", 25*time.Millisecond, "for what `duration` each way is measured at a time")
	flag.IntVar(&o.adds, "adds", 150, "how many `pods` come and go by each plugin; 0 leaves that out")
	flag.StringVar(&o.only, "only", "", "measure these `ways` alone, with commas between; veth is always there")
	flag.StringVar(&o.measures, "measures", "RR,CRR,RR-1CPU,CRR-1CPU,STREAM,8-STREAMS", "take these `measures` of each way, with commas between")
	flag.Parse()
	enclosed.Main("pods", nil, func(ctx context.Context, dir string) error { return measure(ctx, o, dir) })
}

func measure(ctx context.Context, o options, dir string) error {
	defer traffic.Prepare()()
	var err error
	if o.kit, err = filepath.Abs(o.kit); err != nil {
		return err
	}
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	load, _ := os.ReadFile("/proc/loadavg")
	b := &bench{options: o, dir: dir}
	var rows [][]string
	if err := b.measureWays(ctx); err != nil {
		return err
	}
	rows, missed := b.pathRows()
	header := []string{"WHERE", "WAY"}
	for _, m := range traffic.Measures {
		header = append(header, m.Name)
	}
	fmt.Print(report.Table(header, rows))
	if o.adds > 0 {
		fmt.Println()
		kinds, err := b.measureAdds(ctx)
		if err != nil {
			return err
		}
		rows, more := addRows(kinds)
		missed = append(missed, more...)
		fmt.Print(report.Table([]string{"PLUGIN", "ADD-P50", "ADD-P99", "DEL-P50", "DEL-P99", "ADD-CPU"}, rows))
	}
	var name unix.Utsname
	_ = unix.Uname(&name)
	fmt.Printf("\n%s, Linux %s, %d processors, a load of %s when it began, %d rounds of %v\n", time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(name.Release[:]),
		runtime.NumCPU(), strings.Fields(string(load) + " ?")[0], o.rounds, o.slice)
	for _, m := range missed {
		fmt.Println("missed:", m)
	}
	return nil
}
