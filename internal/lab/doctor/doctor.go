// Package doctor reports what a machine has and lacks for a lab, each with its remedy. It tries things rather than derive
// them from version numbers: it mounts, makes devices and loads rules in temporary namespaces, which end with their thread,
// so that nothing is left behind.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/topology"
)

// Status is the outcome of a check.
type Status string

// The outcomes of a check. Fail means that a lab cannot run; everything else that is missing or scarce is a Warn.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Check is the result of one check.
type Check struct {
	Name     string `json:"name"`
	Category string `json:"category"`
	Status   Status `json:"status"`
	// Found says in one line what there is, or what is missing and what does not work without it.
	Found string `json:"found"`
	// Remedy says what to do; empty when there is nothing to do.
	Remedy string `json:"remedy,omitempty"`
	// Needed is true when the lab cannot start without it.
	Needed bool `json:"needed"`
}

// The categories, in the order of the report.
const (
	rights   = "rights"
	kernel   = "kernel"
	cgroups  = "cgroups"
	storage  = "storage"
	links    = "network"
	rules    = "packet rules"
	wires    = "wires"
	limits   = "limits"
	programs = "programs"
)

// Options describes the labs that the machine should run. The zero value means a default lab and all checks.
type Options struct {
	// StateDir is where labs keep their files. It need not exist yet. If it is empty, storage is not checked.
	StateDir string
	// KitDir is the kit's directory; empty means the kit that belongs to this executable.
	KitDir string
	// Clusters and Nodes are the numbers to be started, and ControlPlanes how many of the nodes are control-plane nodes. No
	// clusters means a default lab.
	Clusters, Nodes, ControlPlanes int
	// NeedNFTables, NeedIPTables, NeedIPVS, NeedVXLAN, NeedBridgeFilter, NeedTBF and NeedNetem make a missing feature a failure
	// instead of a warning.
	NeedNFTables, NeedIPTables, NeedIPVS, NeedVXLAN, NeedBridgeFilter, NeedTBF, NeedNetem bool
	// Quick leaves out every check that cannot fail.
	Quick bool
}

// For returns the options that check the machine for a lab.
func For(lab *topology.Lab) Options {
	o := Options{Clusters: len(lab.Clusters)}
	for i := range lab.Clusters {
		c := &lab.Clusters[i]
		o.Nodes += len(c.Nodes)
		o.ControlPlanes += len(c.ControlPlanes())
		o.NeedNFTables = o.NeedNFTables || c.Proxy.Mode == "nftables"
		o.NeedIPTables = o.NeedIPTables || c.Proxy.Mode == "iptables" || c.Proxy.Mode == "ipvs"
		o.NeedIPVS = o.NeedIPVS || c.Proxy.Mode == "ipvs"
		needs := c.Network.Needs()
		o.NeedVXLAN = o.NeedVXLAN || needs.VXLAN
		o.NeedBridgeFilter = o.NeedBridgeFilter || needs.BridgeFilter
		for j := range c.Nodes {
			w := c.Nodes[j].Wire
			o.NeedTBF = o.NeedTBF || w.Rate != ""
			o.NeedNetem = o.NeedNetem || w.Delay != "" || w.Loss != 0
		}
	}
	return o
}

// exam is one run of the checks.
type exam struct {
	Options
	host   host
	now    time.Time
	checks []Check
}

// Run runs the checks. It needs no privilege: it reports what an ordinary user cannot try.
func Run(ctx context.Context, o Options) []Check {
	if o.Clusters == 0 {
		o.Clusters, o.Nodes, o.ControlPlanes = 2, 6, 2
	}
	e := &exam{Options: o, host: thisHost(), now: time.Now()}
	for _, examine := range []func(context.Context){
		e.rights,
		e.kernel,
		e.cgroups,
		e.storage,
		e.network,
		e.limits,
		e.programs,
	} {
		if ctx.Err() != nil {
			e.fail(kernel, "time", "the checks were interrupted: "+ctx.Err().Error(), "run fathom doctor again")
			break
		}
		examine(ctx)
	}
	return e.checks
}

func (e *exam) ok(category, name, found string) {
	e.checks = append(e.checks, Check{Name: name, Category: category, Status: OK, Found: found})
}

func (e *exam) warn(category, name, found, remedy string) {
	e.checks = append(e.checks, Check{Name: name, Category: category, Status: Warn, Found: found, Remedy: remedy})
}

func (e *exam) fail(category, name, found, remedy string) {
	e.checks = append(e.checks, Check{Name: name, Category: category, Status: Fail, Found: found, Remedy: remedy, Needed: true})
}

// miss reports a failure if the lab needs the thing, and otherwise a warning.
func (e *exam) miss(needed bool, category, name, found, remedy string) {
	if needed {
		e.fail(category, name, found, remedy)
	} else {
		e.warn(category, name, found, remedy)
	}
}

// have reports a success and marks whether it was needed.
func (e *exam) have(needed bool, category, name, found string) {
	e.checks = append(e.checks, Check{Name: name, Category: category, Status: OK, Found: found, Needed: needed})
}

// Failed returns the error with which `up` stops, or nil if no check failed.
func Failed(checks []Check) error {
	var lines []string
	for _, c := range checks {
		if c.Status != Fail {
			continue
		}
		line := c.Name + ": " + c.Found
		if c.Remedy != "" {
			line += "\n      " + c.Remedy
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil
	}
	count := "one thing"
	if len(lines) > 1 {
		count = fmt.Sprintf("%d things", len(lines))
	}
	return errors.New("this machine lacks " + count + " that the lab needs (fathom doctor reports the rest):\n  - " +
		strings.Join(lines, "\n  - "))
}
