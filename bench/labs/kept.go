package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// What a lab has that is forked.
const (
	keptPods     = 100
	keptServices = 30
)

// kept measures how long it takes to save a lab with many pods, and to fork it.
func (b *bench) kept(ctx context.Context, r results) error {
	l, _, err := b.up(ctx, oneLab, "--clusters", "1")
	if err != nil {
		return err
	}
	var services strings.Builder
	for i := range keptServices {
		fmt.Fprintf(&services, "---\napiVersion: v1\nkind: Service\nmetadata: {name: s%d}\nspec: {selector: {app: many}, ports: [{port: 80}]}\n", i)
	}
	if err := l.create(ctx, services.String()); err != nil {
		return err
	}
	if _, err := l.schedule(ctx, keptPods); err != nil {
		return err
	}
	size, seconds, err := l.save(ctx)
	if err != nil {
		return err
	}
	r.add("save", seconds)
	r.add("save size", size)
	out, err := b.run(ctx, "", b.fathom, "fork", oneLab, "--name", forkLab, "--timings")
	if err != nil {
		return err
	}
	api, err := stepEnd(out, "start the API server")
	if err != nil {
		return err
	}
	r.add("fork api", api)
	fork := &lab{bench: b, name: forkLab, cluster: "east"}
	start := time.Now()
	_, err = fork.kubectl(ctx, "", "wait", "--timeout=3m", fmt.Sprintf("--for=jsonpath={.status.readyReplicas}=%d", keptPods), "deployment/many")
	if err != nil {
		return err
	}
	took, err := lastEnd(out)
	if err != nil {
		return err
	}
	r.add("fork", took+time.Since(start).Seconds())
	if err := b.down(forkLab); err != nil {
		return err
	}
	return b.down(oneLab)
}

// save saves the lab to a file, and returns the file's size in MB and how long that took.
func (l *lab) save(ctx context.Context) (size, seconds float64, err error) {
	file := filepath.Join(l.home, "lab.tar.zst")
	start := time.Now()
	if _, err := l.run(ctx, "", l.fathom, "save", l.name, "--to", file); err != nil {
		return 0, 0, err
	}
	seconds = time.Since(start).Seconds()
	info, err := os.Stat(file)
	if err != nil {
		return 0, 0, err
	}
	return float64(info.Size()) / 1e6, seconds, nil
}

// timelineStep is a line of the timeline that --timings prints: a step, when it began, and how long it took, in seconds.
var timelineStep = regexp.MustCompile(`(?m)^(\S.*?) +([0-9.]+)s +([0-9.]+)s \|`)

// stepEnd returns when the step of that name ended, in seconds from the first.
func stepEnd(out, name string) (float64, error) {
	for _, m := range timelineStep.FindAllStringSubmatch(out, -1) {
		if strings.HasSuffix(m[1], name) {
			return ends(m)
		}
	}
	return 0, fmt.Errorf("the timeline has no step %q:\n%s", name, out)
}

// lastEnd returns when the last step ended.
func lastEnd(out string) (last float64, err error) {
	for _, m := range timelineStep.FindAllStringSubmatch(out, -1) {
		end, err := ends(m)
		if err != nil {
			return 0, err
		}
		last = max(last, end)
	}
	if last == 0 {
		return 0, fmt.Errorf("there is no timeline:\n%s", out)
	}
	return last, nil
}

func ends(m []string) (float64, error) {
	began, err := strconv.ParseFloat(m[2], 64)
	if err != nil {
		return 0, err
	}
	took, err := strconv.ParseFloat(m[3], 64)
	return began + took, err
}
