package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/bench/traffic"
	"github.com/fathom-network/fathom/internal/facts/conflist"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
)

// work is what it takes a way's enforcer on the first node to follow the API.
type work struct {
	start, startCPU []time.Duration // from the start of its process until an empty kernel has all
	label, policy   []time.Duration // from the API server's answer until a packet meets the change
	asked           []time.Duration // what the API server took to answer
	changeCPU       time.Duration   // for each change
	memory          float64         // bytes
}

// measureWork measures one way after the other: nobody else works meanwhile.
func (b *bench) measureWork(ctx context.Context) error {
	for _, w := range b.ways {
		fmt.Fprintf(os.Stderr, "policies: %s with %d policies starts, and follows changes\n", w.name, w.policies)
		var err error
		switch {
		case w.name == chains:
			err = b.measureChains(ctx, w)
		case w.policies > 0:
			if err = b.measureStarts(ctx, w); err == nil {
				err = b.measureChanges(ctx, w)
			}
		}
		if err != nil {
			return fmt.Errorf("%s with %d policies: %w", w.name, w.policies, err)
		}
		if cmd := w.enforcer(); cmd != nil {
			if w.work.memory, err = memory(cmd); err != nil {
				return err
			}
		}
	}
	return nil
}

// enforcer is the program on the first node that enforces policies.
func (w *way) enforcer() *exec.Cmd {
	switch w.name {
	case chains:
		return nil
	case queue:
		return w.nodes[0].other
	}
	return w.nodes[0].agent
}

// measureChains measures the load of all rules, of which kube-router makes one for every change.
func (b *bench) measureChains(_ context.Context, w *way) error {
	rules := chainRules(w, 1)
	for range b.starts {
		began := time.Now()
		if _, err := command(w.nodes[0].Namespace, rules, nil, "nft", "-f", "-"); err != nil {
			return err
		}
		w.work.start = append(w.work.start, time.Since(began))
	}
	return nil
}

func (b *bench) measureStarts(ctx context.Context, w *way) error {
	n := w.nodes[0]
	for range b.starts {
		b.stop(w.enforcer())
		began := time.Now()
		var err error
		if w.name == queue {
			err = b.startOther(ctx, w)
		} else {
			// Its file comes when the kernel holds all.
			mark := n.at(conflist.ClosedMark)
			if _, err := command(n.Namespace, "", nil, "nft", "delete", "table", "inet", ruleset.PolicyTable); err != nil {
				return err
			}
			if err := os.Remove(mark); err != nil {
				return err
			}
			began = time.Now()
			if err = b.startAgent(n); err == nil {
				err = within(ctx, func() bool { _, err := os.Stat(mark); return err == nil })
			}
		}
		if err != nil {
			return fmt.Errorf("start: %w", err)
		}
		w.work.start = append(w.work.start, time.Since(began))
		spent, err := processorTime(w.enforcer())
		if err != nil {
			return err
		}
		w.work.startCPU = append(w.work.startCPU, spent)
	}
	return nil
}

// startOther starts kube-network-policies, and returns when it answers the kernel: before, packets wait for it, and are dropped.
func (b *bench) startOther(_ context.Context, w *way) error {
	p, err := beginProber(w.pods[asker], w.pods[answerer])
	if err != nil {
		return err
	}
	defer p.end()
	began := time.Now()
	if err := b.startQueue(w.nodes[0]); err != nil {
		return err
	}
	_, err = p.opens(began)
	return err
}

func within(ctx context.Context, is func() bool) error {
	for began := time.Now(); !is(); time.Sleep(time.Millisecond) {
		if ctx.Err() != nil || time.Since(began) > time.Minute {
			return errors.Join(errors.New("not within a minute"), ctx.Err())
		}
	}
	return nil
}

// measureChanges changes the label by which a pod may reach another, and the policy that says so, in turn to what allows it and what does not.
func (b *bench) measureChanges(ctx context.Context, w *way) error {
	p, err := beginProber(w.pods[asker], w.pods[answerer])
	if err != nil {
		return err
	}
	defer p.end()
	if _, err := p.opens(time.Now()); err != nil {
		return err
	}
	before, err := processorTime(w.enforcer())
	if err != nil {
		return err
	}
	label := func(value string) error {
		_, err := b.cluster.CoreV1().Pods(namespace(asker)).Patch(ctx, podName(w.number, asker), types.MergePatchType,
			fmt.Appendf(nil, `{"metadata": {"labels": {%q: %q}}}`, latencyLabel, value), metav1.PatchOptions{})
		return err
	}
	policy := func(value string) error {
		_, err := b.cluster.NetworkingV1().NetworkPolicies(namespace(answerer)).Update(ctx, latencyPolicy(w.number, value), metav1.UpdateOptions{})
		return err
	}
	changes := b.changes
	if w.policies >= 10_000 {
		changes /= 5
	}
	for _, kind := range []struct {
		change func(value string) error
		took   *[]time.Duration
	}{{label, &w.work.label}, {policy, &w.work.policy}} {
		for i := range changes {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			began := time.Now()
			if err := kind.change([]string{no, yes}[i%2]); err != nil {
				return err
			}
			answered := time.Now()
			wait := p.closes
			if i%2 == 1 {
				wait = func() (time.Time, error) { return p.opens(began) }
			}
			at, err := wait()
			if err != nil {
				return fmt.Errorf("change %d: %w", i, err)
			}
			*kind.took = append(*kind.took, max(0, at.Sub(answered)))
			w.work.asked = append(w.work.asked, answered.Sub(began))
		}
		if changes%2 == 1 {
			if err := kind.change(yes); err != nil {
				return err
			}
			if _, err := p.opens(time.Now()); err != nil {
				return err
			}
		}
	}
	after, err := processorTime(w.enforcer())
	w.work.changeCPU = (after - before) / time.Duration(2*max(1, changes))
	return err
}

// processorTime is what a process has used.
func processorTime(cmd *exec.Cmd) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
	var ticks time.Duration
	for _, f := range fields[11:13] { // utime and stime: proc_pid_stat(5)
		n, err := strconv.Atoi(f)
		if err != nil {
			return 0, err
		}
		ticks += time.Duration(n)
	}
	return ticks * time.Second / 100, nil // USER_HZ
}

// memory is VmRSS of a process.
func memory(cmd *exec.Cmd) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	kb, err := strconv.ParseFloat(number, 64)
	return kb * 1024, err
}

func (b *bench) workRows() (rows [][]string, missed []string) {
	seconds := func(all []time.Duration) string {
		if len(all) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.2f s", traffic.Percentile(all, 50).Seconds())
	}
	ms := func(all []time.Duration, p int) string {
		if len(all) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.1f ms", traffic.Percentile(all, p).Seconds()*1000)
	}
	var asked []time.Duration
	for _, w := range b.ways {
		row := []string{w.name, fmt.Sprint(w.policies), seconds(w.work.start), seconds(w.work.startCPU), ms(w.work.label, 50), ms(w.work.label, 99), ms(w.work.policy, 50), ms(w.work.policy, 99), "-", "-"}
		if len(w.work.label) > 0 {
			row[8] = fmt.Sprintf("%.1f ms", w.work.changeCPU.Seconds()*1000)
		}
		if w.work.memory > 0 {
			row[9] = fmt.Sprintf("%.0f MB", w.work.memory/1e6)
		}
		rows = append(rows, row)
		asked = append(asked, w.work.asked...)
	}
	if len(asked) > 0 {
		b.notes = append(b.notes, fmt.Sprintf("the API server took %s (p50) and %s (p99) to answer a change", ms(asked, 50), ms(asked, 99)))
	}
	for policies, limit := range map[int]time.Duration{1000: 500 * time.Millisecond, 10_000: 3 * time.Second} {
		if w := b.find(fathom, policies); w != nil && len(w.work.start) > 0 && traffic.Percentile(w.work.start, 50) > limit {
			missed = append(missed, fmt.Sprintf("%d policies take %s from the start of the agent, the goal is at most %v", policies, seconds(w.work.start), limit))
		}
	}
	if w := b.find(fathom, 1000); w != nil && len(w.work.label) > 0 {
		const limit, most = 10 * time.Millisecond, 80e6
		for what, took := range map[string][]time.Duration{"label": w.work.label, "policy": w.work.policy} {
			if traffic.Percentile(took, 99) > limit {
				missed = append(missed, fmt.Sprintf("1,000 policies: a change of a %s takes %s (p99), the goal is at most %v", what, ms(took, 99), limit))
			}
		}
		if w.work.memory > most {
			missed = append(missed, fmt.Sprintf("1,000 policies: the agent has %.0f MB, the goal is at most 80 MB", w.work.memory/1e6))
		}
	}
	slices.Sort(missed)
	return rows, missed
}
