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
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/bench/enclosed"
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
	enclosed.Main("policies", []enclosed.Mount{{At: "/run", Kind: "tmpfs"}}, func(ctx context.Context, dir string) error { return measure(ctx, o, dir) })
}

func measure(ctx context.Context, o options, dir string) error {
	for _, path := range []*string{&o.kit, &o.bin, &o.other} {
		absolute, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = absolute
	}
	load, _ := os.ReadFile("/proc/loadavg")
	b := &bench{options: o, dir: dir}
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
