// Command conformance runs Kubernetes' own end-to-end tests of networking against a lab, and keeps the score.
//
// It brings a lab up (or uses one that is there), runs the specs of [sig-network] that the flags select with
// upstream's e2e.test, takes the lab down, and writes what passed, what failed and what was left out, with the
// reason, into docs/conformance.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	// The first Ctrl-C ends the tests and takes the lab down; the second one is for who cannot wait.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	o, err := parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(0)
	}
	if err == nil {
		err = tidily(func() error { return run(ctx, os.Stdout, o) })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		if ctx.Err() != nil {
			os.Exit(130)
		}
		os.Exit(1)
	}
}

// tidily has what f starts make its temporary files where they go with it: the suite leaves a directory each time.
func tidily(f func() error) error {
	dir, err := os.MkdirTemp("", "conformance-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return err
	}
	return f()
}

type options struct {
	setting
	fathom  string // the command
	kit     string // the directory of the kit
	results string // what a run leaves for whom it may interest: reports and logs
	board   string // the file with the scoreboard; empty for none
	lab     string // a lab that is there; empty to bring one up for the run
	workers int
	procs   int
	timeout time.Duration
	focus   *regexp.Regexp
	skip    *regexp.Regexp
	short   bool
	all     bool
}

// parse reads the flags. Empty values are as good as none, so that a Makefile can pass what it was given or not.
func parse(args []string, out io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("conformance", flag.ContinueOnError)
	f.SetOutput(out)
	f.StringVar(&o.fathom, "fathom", "bin/fathom", "the fathom `command`")
	f.StringVar(&o.kit, "kit", "bin/kit", "the `directory` of the kit")
	f.StringVar(&o.results, "results", "bin/conformance", "`directory` for reports and logs, one below it for each network")
	f.StringVar(&o.board, "board", "docs/conformance.md", "`file` with the scoreboard; \"none\" to leave it alone")
	f.StringVar(&o.lab, "name", "", "use this `lab`, which is up, and leave it up; its first cluster says what is tested")
	f.StringVar(&o.Network, "network", "", "pod network of the lab (default fathom)")
	f.StringVar(&o.Proxy, "proxy", "", "Service proxy of the lab (default as of `fathom up`)")
	f.StringVar(&o.Mode, "proxy-mode", "", "mode of the proxy (default its own)")
	f.StringVar(&o.Family, "ip-family", "", "ipv4, ipv6 or dual (default ipv4)")
	f.IntVar(&o.workers, "workers", 2, "workers of the lab; three and more are spread over three zones")
	f.IntVar(&o.procs, "procs", 6, "how many specs run at the same time")
	f.DurationVar(&o.timeout, "timeout", 3*time.Hour, "when to give the tests up")
	focus := f.String("focus", "", "run the specs whose names match this `pattern` (default those tagged [Conformance])")
	skip := f.String("skip", "", "but not those that match this `pattern`")
	f.BoolVar(&o.short, "short", false, "run the short list: seven quick specs that tell most")
	f.BoolVar(&o.all, "all", false, "run also what is left out because it cannot pass here")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if f.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q; see --help", f.Arg(0))
	}
	if o.board == "none" {
		o.board = ""
	}
	o.setting = o.withDefaults()
	if *focus == "" {
		*focus = `\[Conformance\]`
	}
	var problems []error
	compile := func(name, pattern string) *regexp.Regexp {
		re, err := regexp.Compile(pattern)
		if err != nil {
			problems = append(problems, fmt.Errorf("--%s: %w", name, err))
		}
		return re
	}
	o.focus = compile("focus", *focus)
	if *skip != "" {
		o.skip = compile("skip", *skip)
	}
	if o.workers < 1 {
		problems = append(problems, fmt.Errorf("--workers %d: at least 1", o.workers))
	}
	if o.procs < 1 {
		problems = append(problems, fmt.Errorf("--procs %d: at least 1", o.procs))
	}
	for _, path := range []*string{&o.fathom, &o.kit, &o.results} {
		var err error
		if *path, err = filepath.Abs(*path); err != nil {
			problems = append(problems, err)
		}
	}
	return o, errors.Join(problems...)
}

// run is the whole of it, step by step.
func run(ctx context.Context, out io.Writer, o options) error {
	if os.Geteuid() != 0 {
		return errors.New("a lab needs root, since nodes are namespaces, mounts and devices: run it with sudo")
	}
	if o.board != "" { // what would be a pity to find out at the end
		if err := checkBoard(o.board); err != nil {
			return err
		}
	}
	suite := suite{kit: o.kit}
	specs, err := suite.list(ctx)
	if err != nil {
		return err
	}
	if o.lab != "" {
		if o.setting, err = settingOf(o.lab); err != nil {
			return err
		}
	}
	chosen, left, err := choose(specs, o, probe())
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s: %d of %d specs of sig-network, %d left out\n", o.setting, len(chosen), len(specs), len(left))
	dir := filepath.Join(o.results, o.dirName())
	ran, err := inLab(ctx, out, o, dir, suite, chosen)
	if err != nil {
		return err
	}
	ran = append(ran, left...)
	if o.board != "" {
		version, err := suite.version(ctx)
		if err != nil {
			return err
		}
		if err := record(o.board, o.setting, version, time.Now(), specs, ran); err != nil {
			return err
		}
		fmt.Fprintf(out, "scoreboard: %s\n", o.board)
	}
	return verdict(out, ran, dir)
}

// inLab runs the specs in the lab that the options name, or else in one of their own.
func inLab(ctx context.Context, out io.Writer, o options, dir string, s suite, specs []string) (ran results, err error) {
	if len(specs) == 0 {
		return nil, nil
	}
	own := o.lab == ""
	if own {
		alone, err := net.Listen("unix", "@fathom-conformance") // no file: it ends with this process, however that ends
		if err != nil {
			return nil, errors.New("another run has its lab up: wait for it, or give this one a lab with --name")
		}
		defer alone.Close()
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	l := &lab{fathom: o.fathom, kit: o.kit, name: o.lab, dir: dir, out: out}
	if own {
		l.name = ownLab
		defer func() { err = errors.Join(err, l.down(ctx)) }()
		if err := l.up(ctx, o.setting, o.workers); err != nil {
			return nil, err
		}
	}
	c, err := l.cluster(ctx)
	if err != nil {
		return nil, err
	}
	if own {
		if err := l.spread(ctx, c); err != nil {
			return nil, err
		}
		if o.Network == "fathom" {
			if err := l.give(ctx, c); err != nil {
				return nil, err
			}
		}
	}
	if err := l.load(ctx, s, specs); err != nil {
		return nil, err
	}
	return s.run(ctx, out, job{specs: specs, kubeconfig: c.kubeconfig, nodes: len(c.workers), dir: dir, procs: o.procs, timeout: o.timeout})
}

// choose divides the specs that the flags select into those that are to run and those that are left out.
func choose(specs []string, o options, here machine) (chosen []string, left results, err error) {
	if o.short {
		known := map[string]bool{}
		for _, s := range specs {
			known[s] = true
		}
		for _, s := range shortList {
			if !known[s] {
				return nil, nil, fmt.Errorf("the short list has %q, and Kubernetes' tests do not", s)
			}
		}
		return shortList, nil, nil
	}
	for _, s := range specs {
		if !o.focus.MatchString(s) || o.skip != nil && o.skip.MatchString(s) {
			continue
		}
		if why := leftOut(s, o.setting, here); why != "" && !o.all {
			left = append(left, result{Spec: s, Outcome: leftOutOutcome, Why: why})
			continue
		}
		chosen = append(chosen, s)
	}
	if len(chosen)+len(left) == 0 {
		return nil, nil, fmt.Errorf("no spec matches --focus '%s'; `%s --list-tests` lists them", o.focus, filepath.Join(o.kit, "test/e2e.test"))
	}
	return chosen, left, nil
}

// verdict prints the score, and what failed. A failure is an error.
func verdict(out io.Writer, ran results, dir string) error {
	count := map[outcome]int{}
	var failed []string
	for _, r := range ran {
		count[r.Outcome]++
		if r.Outcome == failedOutcome {
			failed = append(failed, "  "+r.Spec+"\n      "+r.Why)
		}
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d left out\n", count[passedOutcome], count[failedOutcome], count[leftOutOutcome])
	if len(failed) > 0 {
		return fmt.Errorf("%d failed; %s/*.log tells more:\n%s", len(failed), dir, strings.Join(failed, "\n"))
	}
	return nil
}
