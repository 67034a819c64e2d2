// Command bench measures labs on the machine that it runs on: how long they take to come up and to go, and
// what they cost in memory and on disk. Each round measures everything once, beside a bare start of etcd and
// kube-apiserver, so that a busy or slow machine weighs on both sides of a ratio. The tables of
// docs/benchmarks.md are what it writes. Run it with `make bench`, as root, on a machine with nothing else
// to do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/fathom-network/fathom/bench/report"
)

func main() {
	if len(os.Args) == 4 && os.Args[1] == bareArg {
		if err := bareMain(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.fathom, "fathom", "bin/fathom", "the `program` to measure; fathom-init and the kit are beside it")
	flag.StringVar(&o.doc, "doc", "docs/benchmarks.md", "the `document` to write the tables into; empty: print them only")
	flag.IntVar(&o.rounds, "rounds", 5, "how many `rounds`")
	flag.BoolVar(&o.settings, "settings", false, "measure what crun and other settings give instead (about 5 minutes a round)")
	flag.BoolVar(&o.many, "many", false, "measure a cluster of 20 workers with 100 pods instead (about 3 minutes)")
	flag.Parse()
	if flag.NArg() > 0 || o.rounds < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	fathom, doc    string
	rounds         int
	settings, many bool
}

// The labs of a run.
const (
	oneLab     = "bench-one"
	defaultLab = "bench-two"
	manyLab    = "bench-many"
	forkLab    = "bench-fork"
)

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("must run as root: labs are namespaces, mounts and devices")
	}
	b, err := newBench(o.fathom)
	if err != nil {
		return err
	}
	defer b.close()
	clear := func() error {
		var errs []error
		for _, name := range []string{oneLab, defaultLab, manyLab, forkLab} {
			errs = append(errs, b.down(name))
		}
		return errors.Join(errs...)
	}
	if err := clear(); err != nil { // of a run that was killed
		return err
	}
	defer func() { err = errors.Join(err, clear()) }()

	version, err := b.run(ctx, "", b.fathom, "version")
	if err != nil {
		return err
	}
	about := describe(version, o.rounds, time.Now())
	measure := (*bench).startUp
	switch {
	case o.settings:
		measure = (*bench).settings
	case o.many:
		measure = (*bench).manyNodes
	}
	sections, err := measure(b, ctx, o.rounds, about)
	if err != nil {
		return err
	}
	for _, s := range sections {
		fmt.Printf("\n%s\n", strings.TrimRight(s.Text, "\n"))
	}
	if o.doc == "" {
		return nil
	}
	return report.Write(o.doc, sections)
}

// say tells of progress on standard error; the tables go to standard output.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// settle is how long a lab is left alone before its memory is read.
const settle = 5 * time.Second

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// results are the samples by name.
type results map[string]sample

func (r results) add(name string, value float64) { r[name] = append(r[name], value) }

// startUp measures what `make bench` is about.
func (b *bench) startUp(ctx context.Context, rounds int, about string) ([]report.Section, error) {
	say("once before, unmeasured: the images are prepared, the programs read from the disk, and templates left")
	if _, _, err := b.up(ctx, defaultLab); err != nil {
		return nil, err
	}
	if err := b.down(defaultLab); err != nil {
		return nil, err
	}
	r := results{}
	var timelines []string
	for i := range rounds {
		bare, err := bareStart(ctx, b.kit)
		if err != nil {
			return nil, err
		}
		r.add("bare", bare.Seconds)
		r.add("bare cpu", bare.CPUSeconds)
		timeline, err := b.oneCluster(ctx, r)
		if err != nil {
			return nil, err
		}
		timelines = append(timelines, timeline)
		if err := b.stepByStep(ctx, r); err != nil {
			return nil, err
		}
		if err := b.withManifest(ctx, r); err != nil {
			return nil, err
		}
		if err := b.twoClusters(ctx, r); err != nil {
			return nil, err
		}
		if err := b.kept(ctx, r); err != nil {
			return nil, err
		}
		say("round %d of %d: bare start %.2f s; one cluster up %.2f s, a Service answers %.2f s (%.2f times), step by step %.2f s, one that came with it %.2f s (%.2f times), 30 pods %.2f s, down %.2f s; two clusters up %.2f s, down %.2f s; a fork of %d pods answers %.2f s, all its pods %.2f s",
			i+1, rounds, bare.Seconds, r["up"][i], r["chain"][i], r["chain"][i]/bare.Seconds, r["fresh"][i], r["manifest"][i], r["manifest"][i]/bare.Seconds, r["30 pods"][i], r["down"][i], r["two up"][i], r["two down"][i], keptPods, r["fork api"][i], r["fork"][i])
	}
	times := []figure{
		{"bare start: etcd + kube-apiserver, ready", "s", 0, r["bare"]},
		{"one cluster, 1+2 nodes: `fathom up`", "s", 0, r["up"]},
		{"… until a pod's request to a Service, by name, is answered", "s", 8, r["chain"]},
		{"… as a multiple of the bare start of its round", "", 3, r["chain"].per(r["bare"])},
		{"… the same with `fathom up --fresh`, step by step", "s", 0, r["fresh"]},
		{"… as a multiple of the bare start of its round", "", 0, r["fresh"].per(r["bare"])},
		{"one cluster with these pods, `fathom up --manifest FILE`, until it is answered", "s", 8, r["manifest"]},
		{"… as a multiple of the bare start of its round", "", 3, r["manifest"].per(r["bare"])},
		{"30 pods of a Deployment on 2 workers, from apply to Ready", "s", 8, r["30 pods"]},
		{"one cluster: `fathom down`", "s", 3, r["down"]},
		{"the default lab, two clusters of 1+2 nodes: `fathom up`", "s", 14, r["two up"]},
		{"… as a multiple of the bare start of its round", "", 0, r["two up"].per(r["bare"])},
		{"the default lab: `fathom down`", "s", 3, r["two down"]},
		{fmt.Sprintf("a lab with %d pods and %d Services: `fathom save`", keptPods, keptServices), "s", 0, r["save"]},
		{"… `fathom fork`, until its API answers", "s", 0, r["fork api"]},
		{"… as a multiple of the bare start of its round", "", 2, r["fork api"].per(r["bare"])},
		{"… until all its pods are Ready", "s", 0, r["fork"]},
	}
	cpu := []figure{
		{"bare start", "CPU-s", 0, r["bare cpu"]},
		{"one cluster until a Service answers, all programs of its nodes", "CPU-s", 0, r["chain cpu"]},
		{"… as a multiple of the bare start of its round", "", 0, r["chain cpu"].per(r["bare cpu"])},
		{"… the same with `fathom up --fresh`, step by step", "CPU-s", 0, r["fresh cpu"]},
		{"… what it takes of that", "", 0, r["chain cpu"].per(r["fresh cpu"])},
	}
	for _, name := range cpuPrograms {
		cpu = append(cpu, figure{"… of which " + name, "CPU-s", 0, r["cpu of "+name]})
	}
	cpu = append(cpu, []figure{
		{"… of which what has ended: runc, CNI plugins, kubeadm, probes", "CPU-s", 0, r["cpu of ended"]},
		{"30 pods of a Deployment, all programs of the nodes", "CPU-s", 0, r["30 pods cpu"]},
		{"the default lab, all programs of its nodes", "CPU-s", 0, r["two up cpu"]},
	}...)
	var cost []figure
	for _, name := range ownPrograms {
		cost = append(cost, figure{"worker: " + name, "MB", 0, r[name]})
	}
	cost = append(cost, figure{"worker: these three", "MB", 60, r["own"]})
	for _, name := range []string{"containerd-shim-runc-v2", "pause", "kube-proxy", "coredns"} {
		cost = append(cost, figure{"in pods of the workers, each: " + name, "MB", 0, r[name]})
	}
	for _, name := range planePrograms {
		cost = append(cost, figure{"control plane: " + name, "MB", 0, r[name]})
	}
	cost = append(cost, figure{"the cluster: all processes of its 3 nodes", "MB", 0, r["all"]})
	disk := []figure{
		{"a worker's directory, after its start", "MB", 0, r["disk"]},
		{"… without the CNI plugin that the agent's pod installs", "MB", 5, r["diskOwn"]},
		{"the default lab, in the file of `fathom save`", "MB", 2, r["two size"]},
		{fmt.Sprintf("a lab with %d pods and %d Services, in the file of `fathom save`", keptPods, keptServices), "MB", 0, r["save size"]},
	}
	return []report.Section{
		{Name: "machine", Text: about},
		{Name: "time", Text: figureTable(times)},
		{Name: "processor", Text: figureTable(cpu)},
		{Name: "memory", Text: figureTable(cost)},
		{Name: "disk", Text: figureTable(disk)},
		{Name: "timeline", Text: "```\n" + timelines[r["up"].nearest()] + "\n```"},
	}, nil
}

var (
	ownPrograms = []string{"fathom-init", "containerd", "kubelet"}
	cpuPrograms = []string{"kube-apiserver", "etcd", "kube-controller-manager", "kube-scheduler", "kubelet", "containerd",
		"containerd-shim-runc-v2", "kube-proxy", "coredns"}
	planePrograms = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"}
)

// oneCluster measures a lab of one cluster from its command to its end. It returns the timeline of `up`.
func (b *bench) oneCluster(ctx context.Context, r results) (timeline string, err error) {
	start := time.Now()
	l, out, err := b.up(ctx, oneLab, "--clusters", "1")
	if err != nil {
		return "", err
	}
	up := time.Since(start).Seconds()
	if err := l.create(ctx, service); err != nil {
		return "", err
	}
	if err := l.answered(ctx); err != nil {
		return "", err
	}
	r.add("up", up)
	r.add("chain", time.Since(start).Seconds())
	if err := l.measureCPU(ctx, r); err != nil {
		return "", err
	}

	workers, err := l.nodes(ctx, "worker")
	if err != nil {
		return "", err
	}
	disk, err := diskMB(l.dir(workers[0].Name))
	if err != nil {
		return "", err
	}
	plugin, err := pluginMB(l.dir(workers[0].Name))
	if err != nil {
		return "", err
	}
	r.add("disk", disk)
	r.add("diskOwn", disk-plugin)
	if err := pause(ctx, settle); err != nil {
		return "", err
	}
	if err := l.measureMemory(ctx, workers, r); err != nil {
		return "", err
	}

	before := l.cpuSeconds()
	seconds, err := l.schedule(ctx, 30)
	if err != nil {
		return "", err
	}
	r.add("30 pods", seconds)
	if cpu := l.cpuSeconds(); cpu > 0 {
		r.add("30 pods cpu", cpu-before)
	}

	start = time.Now()
	if err := b.down(oneLab); err != nil {
		return "", err
	}
	r.add("down", time.Since(start).Seconds())
	return timelineOf(out), nil
}

// stepByStep measures a lab of one cluster that begins with no template, until a Service answers.
func (b *bench) stepByStep(ctx context.Context, r results) error {
	start := time.Now()
	l, _, err := b.up(ctx, oneLab, "--clusters", "1", "--fresh")
	if err != nil {
		return err
	}
	if err := l.create(ctx, service); err != nil {
		return err
	}
	if err := l.answered(ctx); err != nil {
		return err
	}
	r.add("fresh", time.Since(start).Seconds())
	if cpu := l.cpuSeconds(); cpu > 0 {
		r.add("fresh cpu", cpu)
	}
	return b.down(oneLab)
}

// withManifest measures a lab of one cluster that has the Service and its pods from the beginning.
func (b *bench) withManifest(ctx context.Context, r results) error {
	file := filepath.Join(b.home, "service.yaml")
	if err := os.WriteFile(file, []byte(service), 0o600); err != nil {
		return err
	}
	start := time.Now()
	l, _, err := b.up(ctx, oneLab, "--clusters", "1", "--manifest", file)
	if err != nil {
		return err
	}
	if err := l.answered(ctx); err != nil {
		return err
	}
	r.add("manifest", time.Since(start).Seconds())
	return b.down(oneLab)
}

// measureMemory adds the anonymous memory of a cluster's programs. What a worker has is the mean of all.
func (l *lab) measureMemory(ctx context.Context, workers []machine, r results) error {
	onWorkers, err := processesOf(workers)
	if err != nil {
		return err
	}
	planes, err := l.nodes(ctx, "control-plane")
	if err != nil {
		return err
	}
	onPlanes, err := processesOf(planes)
	if err != nil {
		return err
	}
	mean, own := memory(onWorkers), 0.0
	for name, anon := range mean {
		r.add(name, anon)
	}
	for _, name := range ownPrograms {
		if mean[name] == 0 {
			return fmt.Errorf("no process %s on the workers of lab %s", name, l.name)
		}
		own += mean[name]
	}
	r.add("own", own)
	mean = memory(onPlanes)
	for _, name := range planePrograms {
		r.add(name, mean[name])
	}
	sum := 0.0
	for _, p := range append(onWorkers, onPlanes...) {
		sum += p.anon
	}
	r.add("all", sum)
	return nil
}

// measureCPU adds the processor time that the lab took so far, and by program what runs still.
func (l *lab) measureCPU(ctx context.Context, r results) error {
	total := l.cpuSeconds()
	if total == 0 {
		return nil
	}
	nodes, err := l.nodes(ctx, "")
	if err != nil {
		return err
	}
	running, err := processesOf(nodes)
	if err != nil {
		return err
	}
	r.add("chain cpu", total)
	of, ended := map[string]float64{}, total
	for _, p := range running {
		of[p.name] += p.cpu
		ended -= p.cpu
	}
	for _, name := range cpuPrograms {
		r.add("cpu of "+name, of[name])
	}
	r.add("cpu of ended", max(ended, 0))
	return nil
}

// twoClusters measures the default lab.
func (b *bench) twoClusters(ctx context.Context, r results) error {
	start := time.Now()
	l, _, err := b.up(ctx, defaultLab)
	if err != nil {
		return err
	}
	r.add("two up", time.Since(start).Seconds())
	if cpu := l.cpuSeconds(); cpu > 0 {
		r.add("two up cpu", cpu)
	}
	size, _, err := l.save(ctx)
	if err != nil {
		return err
	}
	r.add("two size", size)
	start = time.Now()
	if err := b.down(defaultLab); err != nil {
		return err
	}
	r.add("two down", time.Since(start).Seconds())
	return nil
}

// manyNodes measures a cluster of 20 workers, once.
func (b *bench) manyNodes(ctx context.Context, _ int, about string) ([]report.Section, error) {
	r := results{}
	start := time.Now()
	l, _, err := b.up(ctx, manyLab, "--clusters", "1", "--workers", "20")
	if err != nil {
		return nil, err
	}
	r.add("up", time.Since(start).Seconds())
	say("20 workers: up %.1f s", r["up"][0])
	workers, err := l.nodes(ctx, "worker")
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, settle); err != nil {
		return nil, err
	}
	if err := l.measureMemory(ctx, workers, r); err != nil {
		return nil, err
	}
	seconds, err := l.schedule(ctx, 100)
	if err != nil {
		return nil, err
	}
	r.add("pods", seconds)
	start = time.Now()
	if err := b.down(manyLab); err != nil {
		return nil, err
	}
	r.add("down", time.Since(start).Seconds())
	rows := [][]string{}
	for _, f := range []figure{
		{"`fathom up --clusters 1 --workers 20`", "s", 0, r["up"]},
		{"100 pods of a Deployment, from apply to Ready", "s", 0, r["pods"]},
		{"`fathom down`", "s", 0, r["down"]},
		{"anonymous memory of a worker's own programs, mean", "MB", 0, r["own"]},
		{"anonymous memory of all processes of the 21 nodes", "MB", 0, r["all"]},
	} {
		rows = append(rows, []string{f.what, f.format(f.sample[0])})
	}
	return []report.Section{{Name: "many", Text: about + "\n" + report.Table([]string{"one run", ""}, rows)}}, nil
}
