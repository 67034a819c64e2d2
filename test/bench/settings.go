package main

import (
	"context"
	"fmt"
	"os/exec"
	"time"
)

// A variant is a change of a node's settings: a shell script that runs on the node before its containerd and
// kubelet start again.
type variant struct{ name, script string }

const kubeletConfig = "/var/lib/kubelet/config.yaml"

// variants are what `-settings` compares. The first one changes nothing: it shows how far apart two runs of
// the same thing are.
func variants() []variant {
	all := []variant{
		{"nothing changed (how much two runs of the same differ)", ":"},
		{"kubelet: kubeAPIQPS 500, kubeAPIBurst 1000 (50, 100)", "printf 'kubeAPIQPS: 500\\nkubeAPIBurst: 1000\\n' >>" + kubeletConfig},
		{"kubelet: feature gate EventedPLEG (off)", "printf 'featureGates: {EventedPLEG: true}\\n' >>" + kubeletConfig},
		{"kubelet: serializeImagePulls true (false)", "sed -i 's/^serializeImagePulls:.*/serializeImagePulls: true/' " + kubeletConfig},
		{"containerd: NRI off (on)", "printf \"\\n[plugins.'io.containerd.nri.v1.nri']\\ndisable = true\\n\" >>/etc/containerd/config.toml"},
		{"containerd: GOGC=100 (50)", goEnv("containerd", "GOGC=100")},
		{"kubelet: GOGC=200 (100)", goEnv("kubelet", "GOGC=200")},
		{"network: bridge plugin alone (with portmap)", "jq 'del(.plugins[1:])' /etc/cni/net.d/10-bridge.conflist >/run/conflist; cp /run/conflist /etc/cni/net.d/10-bridge.conflist"},
	}
	if crun, err := exec.LookPath("crun"); err == nil {
		all = append(all, variant{"crun instead of runc",
			"sed -i \"s|^BinaryName.*|BinaryName = '" + crun + "'|\" /etc/containerd/config.toml"})
	} else {
		say("crun is not installed: left out")
	}
	return all
}

// goEnv puts a script in a program's place that starts it with one more environment variable. Its first
// argument is its own name still: by that the kit's programs know which they are.
func goEnv(program, env string) string {
	return fmt.Sprintf(`cd /usr/local/bin; mv %[1]s %[1]s.real
printf '#!/bin/bash\n%[2]s exec -a "$0" "$0.real" "$@"\n' >%[1]s; chmod 755 %[1]s`, program, env)
}

const (
	// Every file that a variant may change.
	keepScript = `mkdir /run/kept
cp --parents /etc/containerd/config.toml /var/lib/kubelet/config.yaml /etc/cni/net.d/10-bridge.conflist /run/kept`
	// Init starts a service that ends again, a second later.
	applyScript = `cp -r /run/kept/. /
for f in /usr/local/bin/*.real; do [ ! -e $f ] || mv $f ${f%%.real}; done
%s
old=$(pidof containerd kubelet); kill $old
for p in $old; do while kill -0 $p 2>/dev/null; do sleep 0.1; done; done
until ctr version && curl -sf http://127.0.0.1:10248/healthz; do sleep 0.2; done >/dev/null 2>&1`
)

// settings measures 30 pods with each of the variants in each round, in one lab.
func (b *bench) settings(ctx context.Context, rounds int, about string) ([]section, error) {
	l, _, err := b.up(ctx, oneLab, "--clusters", "1")
	if err != nil {
		return nil, err
	}
	workers, err := l.nodes(ctx, "worker")
	if err != nil {
		return nil, err
	}
	onWorkers := func(script string) error {
		for _, m := range workers {
			if _, err := l.node(ctx, m.Name, script); err != nil {
				return err
			}
		}
		return nil
	}
	if err := onWorkers(keepScript); err != nil {
		return nil, err
	}
	all := append([]variant{{"as the lab has it", ":"}}, variants()...)
	seconds, cpu := make([]sample, len(all)), make([]sample, len(all))
	for round := range rounds {
		for i, v := range all {
			if err := onWorkers(fmt.Sprintf(applyScript, v.script)); err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			// The node's controllers see both restarts before the pods come.
			if err := pause(ctx, 4*time.Second); err != nil {
				return nil, err
			}
			if _, err := l.kubectl(ctx, "", "wait", "--for=condition=Ready", "--timeout=1m", "node", "--all"); err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			before := l.cpuSeconds()
			took, err := l.schedule(ctx, 30)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", v.name, err)
			}
			seconds[i] = append(seconds[i], took)
			cpu[i] = append(cpu[i], l.cpuSeconds()-before)
			say("round %d of %d: %5.2f s, %5.2f CPU-s: %s", round+1, rounds, took, cpu[i][round], v.name)
			if err := l.unschedule(ctx); err != nil {
				return nil, err
			}
		}
	}
	var rows [][]string
	for i, v := range all {
		r, c := seconds[i].per(seconds[0]), cpu[i].per(cpu[0])
		rows = append(rows, []string{v.name, figure{unit: "s"}.format(seconds[i].median()),
			fmt.Sprintf("%.2f (%.2f to %.2f)", r.median(), r.min(), r.max()),
			fmt.Sprintf("%.2f (%.2f to %.2f)", c.median(), c.min(), c.max())})
	}
	return []section{{"settings", about + "\n" + table([]string{"setting (the lab's own)", "30 pods", "time, multiple of the lab's", "processor time, multiple"}, rows)}}, nil
}
