// Package svcbench measures how Services are balanced, on any machine and without a cluster: in namespaces that it makes
// there are a real API server, and for each proxy a node, a pod that connects and one that answers for all endpoints.
// Fathom's ways and kube-proxy's, all fed by that API server, take turns in one run, and what counts are ratios
// to connections without a Service, measured in between: a busy machine weighs on both sides.
//
// It is part of the program fathom, and not of the measurements in bench, because users have it: what Services cost on their own
// machine, `fathom bench services` tells them without a checkout. A measurement's nodes and pods are this same program, run
// again in namespaces.
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

// Size is how many Services there are, and how many endpoints each has.
type Size struct{ Services, Endpoints int }

// Options are what to measure. All but KitDir must be given.
type Options struct {
	Sizes   []Size
	Proxies []string // of Proxies
	// PeersUpTo is the largest number of Services that kube-proxy is measured with, which may take minutes there.
	PeersUpTo int
	Rounds    int // of connections
	Changes   int // of endpoints whose effect is waited for, at most
	// Patience is how long a proxy has for the Services from nothing, and for the effect of one change.
	Patience time.Duration
	// Load is how long there are 100 changes a second.
	Load time.Duration
	// Part is the command that, followed by the name of a part and its argument, calls Part in another process.
	Part []string `json:",omitempty"`
	// KitDir is the kit's directory. Without one there is no kube-proxy, and something stands in for the API server.
	KitDir string
}

// The proxies that are measured.
const (
	Connect           = "connect"
	NFTables          = "nftables"
	KubeProxyIPTables = "kube-proxy-iptables"
	KubeProxyNFTables = "kube-proxy-nftables"
)

// Proxies are all of them.
var Proxies = []string{Connect, NFTables, KubeProxyIPTables, KubeProxyNFTables}

// Result is what was measured of one proxy with one size. What was not measured is zero.
type Result struct {
	Size
	Proxy string
	// CRR and RR are how fast connections with a request and an answer, and requests and answers on one connection, are
	// by a Service, as a ratio to the endpoint itself on the same node: medians of rounds.
	CRR, RR Ratio
	// Bare is how fast connections to the endpoint itself are, as a ratio to a node without any proxy. What a proxy
	// costs those who use no Service is there.
	Bare Ratio
	// Start is from the start of the program until a sample of the Services answers; Program is that part of it that the
	// program itself says it spent on the kernel.
	Start, Program float64 `json:",omitempty"` // seconds
	// Changes is how many changes of an EndpointSlice were waited for; P50 and P99 are the times from the moment when
	// another watch has told of one until a connection meets the new endpoint, in milliseconds.
	Changes  int     `json:",omitempty"`
	P50, P99 float64 `json:",omitempty"`
	// CPU is the share of one processor that the program and its children used under ChangeRate changes a second.
	CPU, ChangeRate float64 `json:",omitempty"`
	Memory          float64 `json:",omitempty"` // anonymous memory of the program, in MB
	// Kernel is what the kernel holds for the program, and what that started: maps, rules, sockets, in MB. 0 is not known.
	Kernel float64 `json:",omitempty"`
	Note   string  `json:",omitempty"` // what is missing and why
}

// Ratio is a median with its quartiles.
type Ratio struct{ Median, Low, High float64 }

// Report is a whole run.
type Report struct {
	Date    string
	Kernel  string
	CPUs    int
	Load    float64 // mean number of processes that wanted to run in the minute before
	StandIn bool    `json:",omitempty"` // there was no API server but what stands in for one
	Loads   []Load  // how long the API server took to get the objects
	Results []Result
}

// Load is how long the objects of a size took to be made.
type Load struct {
	Size
	Seconds float64
}

// Run measures. It says on progress what it is at.
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
		// Processes of a run that was interrupted may still be on their way out.
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
	// The end of the first process of a PID namespace is the end of all of them, and then nobody holds the network
	// namespaces, the mounts and what is pinned there.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return report, fmt.Errorf("measure Services: %w", errors.Join(ctx.Err(), err))
	}
	return report, json.Unmarshal(out.Bytes(), &report)
}

// mark is the group of all runs, in which each has one with its process's number as its name, and how the names of their
// directories begin.
const mark = "fathom-bench"

// sweep takes away what runs have left that were killed: a group and a directory, of which both tell whose they are.
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

// hasEnded says whether there is no process of that number. What is no number is nobody's of ours.
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

// Part is what a process of Options.Part does.
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

// run is what the process inside is told.
type run struct {
	Options
	Dir, Group string
}
