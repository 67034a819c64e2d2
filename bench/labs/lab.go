package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/kit"
)

// bench runs fathom as a user would, with a kubeconfig of its own.
type bench struct {
	fathom string
	kit    kit.Kit
	state  string // where fathom keeps labs
	home   string // a directory for the run's own files
}

// newBench finds the programs and makes the run's directory, which close removes.
func newBench(fathom string) (*bench, error) {
	fathom, err := filepath.Abs(fathom)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(fathom); err != nil {
		return nil, fmt.Errorf("%w: build it with `make build`", err)
	}
	b := &bench{fathom: fathom, state: "/var/lib/fathom"}
	if dir := os.Getenv("FATHOM_STATE"); dir != "" {
		b.state = dir
	}
	dir := os.Getenv(kit.Env)
	if dir == "" {
		dir = filepath.Join(filepath.Dir(fathom), "kit")
	}
	if b.kit, err = kit.Open(dir); err != nil {
		return nil, err
	}
	b.home, err = os.MkdirTemp("", "fathom-bench-")
	return b, err
}

func (b *bench) close() { os.RemoveAll(b.home) }

func (b *bench) kubeconfig() string { return filepath.Join(b.home, "kubeconfig") }

// run runs a program and returns what it wrote, standard output and error together.
func (b *bench) run(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// An interrupted fathom cleans up after itself.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = append(os.Environ(), "KUBECONFIG="+b.kubeconfig(), "HOME="+b.home)
	cmd.Stdin = strings.NewReader(stdin)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(name), strings.Join(args, " "), err, out.String())
	}
	return out.String(), nil
}

// lab is a lab of the bench's own.
type lab struct {
	*bench
	name    string
	cluster string
}

// up brings a lab of that name up and returns it with what `fathom up` said.
func (b *bench) up(ctx context.Context, name string, args ...string) (*lab, string, error) {
	out, err := b.run(ctx, "", b.fathom, append([]string{"up", "--name", name, "--timings"}, args...)...)
	return &lab{bench: b, name: name, cluster: "east"}, out, err
}

// down takes a lab down; that there is none is no error.
func (b *bench) down(name string) error {
	if _, err := os.Stat(filepath.Join(b.state, "labs", name)); os.IsNotExist(err) {
		return nil
	}
	// Not under the run's context: an interrupted run takes its labs down, too.
	_, err := b.run(context.Background(), "", b.fathom, "down", "--name", name)
	return err
}

func (l *lab) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	return l.run(ctx, stdin, l.kit.Bin("kubectl"), append([]string{"--context", l.name + "-" + l.cluster}, args...)...)
}

// create makes objects of a manifest, without the schema of the whole API being fetched for it.
func (l *lab) create(ctx context.Context, manifest string) error {
	_, err := l.kubectl(ctx, manifest, "create", "--validate=false", "-f", "-")
	return err
}

// node runs a shell script on a node.
func (l *lab) node(ctx context.Context, node, script string) (string, error) {
	return l.run(ctx, "", l.fathom, "node", "exec", "--name", l.name, node, "--", "sh", "-ec", script)
}

// A machine is a node as `fathom node ls` tells of it.
type machine struct {
	Name string `json:"name"`
	Role string `json:"role"`
	Pid  int    `json:"pid"`
}

// nodes are the nodes of a role, or all of them.
func (l *lab) nodes(ctx context.Context, role string) ([]machine, error) {
	out, err := l.run(ctx, "", l.fathom, "node", "ls", "--name", l.name, "--cluster", l.cluster, "-o", "json")
	if err != nil {
		return nil, err
	}
	var all, found []machine
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		return nil, fmt.Errorf("fathom node ls: %w", err)
	}
	for _, m := range all {
		if role == "" || m.Role == role {
			found = append(found, m)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("lab %s has no node of the role %q", l.name, role)
	}
	return found, nil
}

// dir is a node's directory on the host.
func (l *lab) dir(node string) string { return filepath.Join(l.state, "labs", l.name, "nodes", node) }

// cpuSeconds is the processor time of all processes that ever ran in the lab, or 0 where the kernel does not
// count it.
func (l *lab) cpuSeconds() float64 {
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		data, err := os.ReadFile(filepath.Join(root, "fathom", l.name, "cpu.stat"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "usage_usec" {
				usec, _ := strconv.ParseFloat(f[1], 64)
				return usec / 1e6
			}
		}
	}
	return 0
}

var timelineLine = regexp.MustCompile(`(?m)^step +begins +takes$`)

// timelineOf is the timeline at the end of what `fathom up --timings` says.
func timelineOf(out string) string {
	at := timelineLine.FindStringIndex(out)
	if at == nil {
		return ""
	}
	text, _, _ := strings.Cut(out[at[0]:], "\n\n")
	return strings.TrimRight(text, "\n")
}
