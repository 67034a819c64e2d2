package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// suite is Kubernetes' own e2e.test and the ginkgo that it is run with.
type suite struct{ kit string }

func (s suite) program() string { return filepath.Join(s.kit, "test", "e2e.test") }

// command makes a command in a process group of its own: what a terminal's Ctrl-C means for the tests is decided
// here, and all that they started ends with them.
func command(ctx context.Context, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (s suite) ask(ctx context.Context, args ...string) ([]byte, error) {
	out, err := command(ctx, s.program(), args...).Output()
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: build it with `make kit-e2e`", err)
	}
	if err != nil {
		return nil, fmt.Errorf("e2e.test %s: %w", strings.Join(args, " "), err)
	}
	return out, nil
}

// list returns the names of all specs of sig-network, sorted, without that prefix.
func (s suite) list(ctx context.Context) ([]string, error) {
	out, err := s.ask(ctx, "--list-tests")
	if err != nil {
		return nil, err
	}
	specs := parseList(out)
	if len(specs) == 0 {
		return nil, errors.New("e2e.test --list-tests lists no spec of sig-network")
	}
	return specs, nil
}

// parseList reads lines like `    k8s.io/…/service.go:733: [sig-network] Services should …`.
func parseList(out []byte) []string {
	var specs []string
	for line := range strings.Lines(string(out)) {
		if _, name, found := strings.Cut(line, ": "+sig); found {
			specs = append(specs, strings.TrimSpace(name))
		}
	}
	slices.Sort(specs)
	return slices.Compact(specs)
}

// version is the Kubernetes that the tests are of.
func (s suite) version(ctx context.Context) (string, error) {
	out, err := s.ask(ctx, "--version")
	return strings.TrimSpace(string(out)), err
}

// image is the full name that the tests call one of their images by.
func (s suite) image(ctx context.Context, name string) (string, error) {
	out, err := s.ask(ctx, "--list-images")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); strings.Contains(line, "/"+name+":") {
			return line, nil
		}
	}
	return "", fmt.Errorf("e2e.test --list-images has no %s", name)
}

// A job is specs to run against a cluster.
type job struct {
	specs      []string
	kubeconfig string
	dir        string // for reports and logs
	nodes      int    // on which pods are scheduled; some specs count on what they are told
	procs      int
	timeout    time.Duration
}

// run runs the specs, those that break others after the rest and one at a time.
func (s suite) run(ctx context.Context, out io.Writer, j job) (results, error) {
	var calm, rough []string
	for _, spec := range j.specs {
		if breaksOthers(spec) {
			rough = append(rough, spec)
		} else {
			calm = append(calm, spec)
		}
	}
	var all results
	p := &progress{out: out, total: len(j.specs), start: time.Now()}
	for _, part := range []struct {
		name  string
		specs []string
		procs int
	}{{"specs", calm, j.procs}, {"disruptive", rough, 1}} {
		if len(part.specs) == 0 {
			continue
		}
		j.specs, j.procs = part.specs, part.procs
		found, err := s.runPart(ctx, p, part.name, j)
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

func (s suite) runPart(ctx context.Context, p *progress, name string, j job) (results, error) {
	var patterns []string
	for _, spec := range j.specs {
		patterns = append(patterns, regexp.QuoteMeta(spec))
	}
	// Each process of the tests takes seconds of a processor to make its list of specs: few specs want few.
	procs := min(j.procs, (len(j.specs)+1)/2)
	report := name + ".json"
	cmd := command(ctx, filepath.Join(s.kit, "test", "ginkgo"),
		"--procs="+strconv.Itoa(procs), "--timeout="+j.timeout.String(), "--no-color", "-v", "--silence-skips",
		"--focus="+regexp.QuoteMeta(sig)+"(?:"+strings.Join(patterns, "|")+")$",
		"--output-dir="+j.dir, "--json-report="+report, "--junit-report="+name+".xml",
		s.program(), "--",
		"--provider=skeleton", "--kubeconfig="+j.kubeconfig, "--kubectl-path="+filepath.Join(s.kit, "bin", "kubectl"),
		"--num-nodes="+strconv.Itoa(j.nodes), "--report-dir="+j.dir)
	log, err := os.Create(filepath.Join(j.dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p.log = log
	cmd.Stdout, cmd.Stderr = p, log
	ran := cmd.Run()
	if ctx.Err() != nil {
		return nil, errInterrupted
	}
	f, err := os.Open(filepath.Join(j.dir, report))
	if err != nil {
		return nil, errors.Join(ran, fmt.Errorf("the tests left no report, see %s: %w", log.Name(), err))
	}
	defer f.Close()
	found, err := readReport(bufio.NewReader(f))
	if err != nil {
		return nil, fmt.Errorf("%w; see %s", err, log.Name())
	}
	if missing := without(j.specs, found); len(missing) > 0 {
		return nil, fmt.Errorf("%d specs have no result, %q for one; see %s", len(missing), missing[0], log.Name())
	}
	if ran != nil && !slices.ContainsFunc(found, func(r result) bool { return r.Outcome == failedOutcome }) {
		return nil, fmt.Errorf("no spec failed, but the tests did: %w; see %s", ran, log.Name())
	}
	return found, nil
}

// without returns the specs that have no result.
func without(specs []string, found results) []string {
	have := map[string]bool{}
	for _, r := range found {
		have[r.Spec] = true
	}
	return slices.DeleteFunc(slices.Clone(specs), func(s string) bool { return have[s] })
}

// progress copies what ginkgo says to a log, and tells a line of each spec when it ends.
type progress struct {
	out   io.Writer
	log   io.Writer
	total int
	start time.Time

	done    int
	partial []byte
	ended   string // how the spec ended that the last line was about
	name    string // the spec named last
}

// A spec's report begins with `• [1.234 seconds]` or `• [FAILED] [1.234 seconds]`; its name is in the next line when
// specs run at the same time, and was in an earlier one when they run one after the other.
var endOfSpec = regexp.MustCompile(`^(?:•|S|P)(?: \[([A-Z ]+)\])? \[([0-9.]+) seconds\]$`)

func (p *progress) Write(b []byte) (int, error) {
	if _, err := p.log.Write(b); err != nil {
		return 0, err
	}
	p.partial = append(p.partial, b...)
	for {
		line, rest, found := bytes.Cut(p.partial, []byte("\n"))
		if !found {
			return len(b), nil
		}
		p.line(string(line))
		p.partial = rest
	}
}

func (p *progress) line(line string) {
	if name, ours := strings.CutPrefix(line, sig); ours {
		name, _, _ = strings.Cut(name, " [sig-network") // the labels that ginkgo adds
		p.name = strings.Replace(name, "[It] ", "", 1)
	}
	switch {
	case p.ended != "" && p.name != "":
		p.done++
		fmt.Fprintf(p.out, "%4.0fs %3d/%d %s  %s\n", time.Since(p.start).Seconds(), p.done, p.total, p.ended, p.name)
		p.ended, p.name = "", ""
	case p.ended != "":
		p.ended = ""
	}
	if m := endOfSpec.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
		state := "passed"
		if m[1] != "" {
			state = strings.ToLower(m[1])
		}
		seconds, _ := strconv.ParseFloat(m[2], 64)
		p.ended = fmt.Sprintf("%-7s %5.1fs", state, seconds)
	}
}
