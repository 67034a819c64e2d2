package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/fathom-network/fathom/bench/report"
)

// A variant is a change of a node's settings: a shell script that runs on the node before its containerd and
// kubelet start again.
type variant struct{ name, script string }

// crunScript puts a wrapper in runc's place. containerd 2.4 writes version 1.3 of the OCI specification, which
// a crun as old as Debian 12's (1.8.1) refuses with "unknown version specified"; the wrapper says 1.0.2. It
// costs a shell and a sed, some 3 ms, for each container.
const crunScript = `cat >/usr/local/bin/crun-wrapped <<'EOF'
#!/bin/sh
for a; do
  [ "$prev" != --bundle ] || sed -i 's/"ociVersion":"[^"]*"/"ociVersion":"1.0.2"/' "$a/config.json"
  prev=$a
done
exec %s "$@"
EOF
chmod 755 /usr/local/bin/crun-wrapped
sed -i "s|^BinaryName.*|BinaryName = '/usr/local/bin/crun-wrapped'|" /etc/containerd/config.toml`

const kubeletConfig = "/var/lib/kubelet/config.yaml"

// variants are what `-settings` compares. One changes nothing: it shows how far apart two runs of the
// same thing are.
func variants() []variant {
	all := []variant{
		{"nothing changed (how much two runs of the same differ)", ":"},
		{"kubelet: kubeAPIQPS 500, kubeAPIBurst 1000 (50, 100)", "printf 'kubeAPIQPS: 500\\nkubeAPIBurst: 1000\\n' >>" + kubeletConfig},
		{"kubelet: feature gate EventedPLEG (off)", "printf 'featureGates: {EventedPLEG: true}\\n' >>" + kubeletConfig},
		{"containerd: NRI off (on)", "printf \"\\n[plugins.'io.containerd.nri.v1.nri']\\ndisable = true\\n\" >>/etc/containerd/config.toml"},
		{"containerd: GOGC=50 (100)", goEnv("containerd", "GOGC=50")},
		{"kubelet: GOGC=200 (100)", goEnv("kubelet", "GOGC=200")},
		{"network: bridge plugin alone (with portmap)", "jq 'del(.plugins[1:])' /etc/cni/net.d/10-bridge.conflist >/run/conflist; cp /run/conflist /etc/cni/net.d/10-bridge.conflist"},
	}
	if crun, err := exec.LookPath("crun"); err == nil {
		all = append([]variant{{"crun instead of runc", fmt.Sprintf(crunScript, crun)}}, all...)
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

// settings measures 30 pods with and without each of the variants, in turn, in one lab.
func (b *bench) settings(ctx context.Context, rounds int, about string) ([]report.Section, error) {
	l, _, err := b.up(ctx, oneLab, "--clusters", "1")
	if err != nil {
		return nil, err
	}
	workers, err := l.nodes(ctx, "worker")
	if err != nil {
		return nil, err
	}
	for _, m := range workers {
		if _, err := l.node(ctx, m.Name, keepScript); err != nil {
			return nil, err
		}
	}
	var rows [][]string
	for _, v := range variants() {
		var with, without, cpuWith, cpuWithout sample
		var failed error
		for round := 0; round < rounds && failed == nil; round++ {
			seconds, cpu, err := l.measureWith(ctx, workers, variant{"as the lab has it", ":"})
			if err != nil {
				return nil, err
			}
			without, cpuWithout = append(without, seconds), append(cpuWithout, cpu)
			seconds, cpu, failed = l.measureWith(ctx, workers, v)
			if failed == nil {
				with, cpuWith = append(with, seconds), append(cpuWith, cpu)
				say("round %d of %d: %5.2f s, %5.2f CPU-s instead of %5.2f s, %5.2f CPU-s: %s", round+1, rounds,
					seconds, cpu, without[round], cpuWithout[round], v.name)
			}
		}
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if failed != nil {
			say("does not work: %s: %v", v.name, failed)
			rows = append(rows, []string{v.name, "does not work", "", ""})
			continue
		}
		rows = append(rows, settingRow(v.name, with, without, cpuWith, cpuWithout))
	}
	bare, err := b.bareSettings(ctx, rounds)
	if err != nil {
		return nil, err
	}
	header := []string{"setting (the lab's own)", "", "time, multiple of the lab's", "processor time, multiple"}
	pods := append([]string{header[0], "30 pods"}, header[2:]...)
	start := append([]string{header[0], "bare start"}, header[2:]...)
	return []report.Section{{Name: "settings", Text: about + "\n" + report.Table(pods, rows) + "\n" + report.Table(start, bare)}}, nil
}

func settingRow(name string, with, without, cpuWith, cpuWithout sample) []string {
	ratio := func(s sample) string { return fmt.Sprintf("%.2f (%.2f to %.2f)", s.median(), s.min(), s.max()) }
	return []string{name, figure{unit: "s"}.format(with.median()), ratio(with.per(without)), ratio(cpuWith.per(cpuWithout))}
}

// measureWith measures 30 pods on workers that are changed so, and removes the pods.
func (l *lab) measureWith(ctx context.Context, workers []machine, v variant) (seconds, cpu float64, err error) {
	for _, m := range workers {
		if _, err := l.node(ctx, m.Name, fmt.Sprintf(applyScript, v.script)); err != nil {
			return 0, 0, err
		}
	}
	// The cluster's controllers see that both have started again before the pods come.
	if err := pause(ctx, 4*time.Second); err != nil {
		return 0, 0, err
	}
	if _, err := l.kubectl(ctx, "", "wait", "--for=condition=Ready", "--timeout=1m", "node", "--all"); err != nil {
		return 0, 0, err
	}
	before := l.cpuSeconds()
	seconds, err = l.schedule(ctx, 30)
	cpu = l.cpuSeconds() - before
	return seconds, cpu, errors.Join(err, l.unschedule(ctx))
}

// bareSettings measures the bare start with etcd and kube-apiserver collecting their garbage less often.
func (b *bench) bareSettings(ctx context.Context, rounds int) ([][]string, error) {
	var rows [][]string
	for _, gogc := range []string{"200", "400"} {
		var with, without, cpuWith, cpuWithout sample
		for range rounds {
			plain, err := bareStart(ctx, b.kit)
			if err != nil {
				return nil, err
			}
			changed, err := bareStart(ctx, b.kit, "GOGC="+gogc)
			if err != nil {
				return nil, err
			}
			without, cpuWithout = append(without, plain.Seconds), append(cpuWithout, plain.CPUSeconds)
			with, cpuWith = append(with, changed.Seconds), append(cpuWith, changed.CPUSeconds)
		}
		rows = append(rows, settingRow("etcd and kube-apiserver: GOGC="+gogc+" (100)", with, without, cpuWith, cpuWithout))
	}
	return rows, nil
}
