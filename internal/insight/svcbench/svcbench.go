// Package svcbench measures how Services are balanced, on any machine and without a cluster. In new namespaces it starts a
// real API server, and for each proxy a node, a pod that connects and one that answers for all endpoints. Fathom's two ways
// and kube-proxy's modes, all fed by that API server, take turns in one run. The results are ratios to connections without
// a Service, measured in between: a busy machine affects both.
//
// It is part of the program fathom, and not of the measurements in bench, for the users: `fathom bench services` shows
// without a checkout what Services cost on their own machine. A measurement's nodes and pods are processes of this same
// program in namespaces.
package svcbench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/cgroup"
)

// Size is the number of Services, and of endpoints of each.
type Size struct{ Services, Endpoints int }

// Options says what to measure. All but KitDir are required.
type Options struct {
	Sizes   []Size
	Proxies []string // of Proxies
	// PeersUpTo is the largest number of Services that kube-proxy is measured with, since it may need minutes for them.
	PeersUpTo int
	Rounds    int // of connections
	Changes   int // of endpoints whose effect is measured, at most
	// Patience is how long a proxy may take to serve all Services after its start, and until one change takes effect.
	Patience time.Duration
	// Load is how long 100 changes per second are made.
	Load time.Duration
	// Part is the command that, followed by a part's name and argument, calls Part in another process.
	Part []string `json:",omitempty"`
	// KitDir is the kit's directory. Without one there is no kube-proxy, and a stand-in for the API server.
	KitDir string
}

// The proxies that are measured.
const (
	Connect           = "connect"
	NFTables          = "nftables"
	KubeProxyIPTables = "kube-proxy-iptables"
	KubeProxyNFTables = "kube-proxy-nftables"
)

// Proxies lists all of them.
var Proxies = []string{Connect, NFTables, KubeProxyIPTables, KubeProxyNFTables}

// Result is the measurement of one proxy with one size. What was not measured is zero.
type Result struct {
	Size
	Proxy string
	// CRR and RR are the rates of connections with a request and a response, and of requests and responses on one
	// connection, to a Service, as ratios to the endpoint itself on the same node: medians of rounds.
	CRR, RR Ratio
	// Bare is the rate of connections to the endpoint itself, as a ratio to a node without any proxy. It shows what a proxy
	// costs connections that use no Service.
	Bare Ratio
	// Start is the time from the start of the program until a sample of the Services answers; Program is the part of it
	// that the program itself reports as work on the kernel.
	Start, Program float64 `json:",omitempty"` // seconds
	// Changes is how many changes of an EndpointSlice were measured; P50 and P99 are the times in milliseconds from the
	// moment at which another watch reports the change until a connection reaches the new endpoint.
	Changes  int     `json:",omitempty"`
	P50, P99 float64 `json:",omitempty"`
	// CPU is the share of one processor that the program and its children used under ChangeRate changes per second.
	CPU, ChangeRate float64 `json:",omitempty"`
	Memory          float64 `json:",omitempty"` // anonymous memory of the program, in MB
	// Kernel is the kernel memory in MB that is held for the program and its children: maps, rules, sockets. 0 means
	// unknown.
	Kernel float64 `json:",omitempty"`
	Note   string  `json:",omitempty"` // what is missing and why
}

// Ratio is a median with its quartiles.
type Ratio struct{ Median, Low, High float64 }

// Report is the result of a run.
type Report struct {
	Date    string
	Kernel  string
	CPUs    int
	Load    float64 // load average of the minute before
	StandIn bool    `json:",omitempty"` // a stand-in was used instead of an API server
	Loads   []Load  // how long creating the objects took
	Results []Result
}

// Load is how long creating the objects of a size took.
type Load struct {
	Size
	Seconds float64
}

// Run measures. It writes what it does to progress.
func Run(ctx context.Context, o Options, progress io.Writer) (report Report, err error) {
	if err := sweep(); err != nil {
		return report, err
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s-%d-", mark, os.Getpid()))
	if err != nil {
		return report, err
	}
	defer os.RemoveAll(dir)
	r := run{Options: o, Dir: dir, Group: fmt.Sprintf("%s/%d", mark, os.Getpid())}
	defer func() {
		// Processes of an interrupted run may still be ending.
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, cgroup.Kill(ending, r.Group), cgroup.Remove(r.Group), cgroup.Prune(mark))
	}()
	groups := append([]string{bare}, o.Proxies...)
	for _, name := range o.Proxies {
		groups = append(groups, programGroup(name))
	}
	for _, name := range groups {
		if err := cgroup.Create(filepath.Join(r.Group, name)); err != nil {
			return report, err
		}
	}
	input, err := json.Marshal(r)
	if err != nil {
		return report, err
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, o.Part[0], append(o.Part[1:], partRun, string(input))...)
	cmd.Stdout, cmd.Stderr = &out, progress
	// When the first process of a PID namespace ends, all others are killed, and then the network namespaces, the mounts
	// and the pins end as well.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return report, fmt.Errorf("measure Services: %w", errors.Join(ctx.Err(), err))
	}
	return report, json.Unmarshal(out.Bytes(), &report)
}

// mark is the cgroup of all runs, in which each has a subgroup named after its process ID, and the prefix of their
// directories' names.
const mark = "fathom-bench"

// sweep removes the groups and directories of runs that were killed; their names tell whose they are.
func sweep() error {
	groups, err := cgroup.List(mark)
	if err != nil {
		return err
	}
	for _, name := range groups {
		if hasEnded(name) {
			if err := cgroup.Remove(filepath.Join(mark, name)); err != nil {
				return err
			}
		}
	}
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), mark+"-*-*"))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), mark+"-"), "-")
		if hasEnded(pid) {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// hasEnded reports whether there is no process with that ID. A text that is not a number was not made by a run.
func hasEnded(pid string) bool {
	n, err := strconv.Atoi(pid)
	return err == nil && errors.Is(syscall.Kill(n, 0), syscall.ESRCH)
}

// The parts of a run, each of which is a process.
const (
	partRun    = "run"
	partProxy  = "proxy"
	partClient = "client"
	partServer = "server"
)

// Part is what a process started by Options.Part executes.
func Part(ctx context.Context, name, argument string) error {
	switch name {
	case partRun:
		return runInside(ctx, argument)
	case partProxy:
		return runProxy(ctx, argument)
	case partClient:
		return runClient(os.Stdin, os.Stdout)
	case partServer:
		return runServer()
	}
	return fmt.Errorf("there is no part %q of the measurement", name)
}

// run is the argument of the process inside.
type run struct {
	Options
	Dir, Group string
}
