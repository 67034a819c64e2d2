// Package answer has the types of agents' reports: on their node, on Services, on load balancers' addresses. `fathom verify`
// compares the reports with what the API's objects imply.
package answer

import (
	"net/netip"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// Status is the result of the agent's last pass.
type Status struct {
	// Ready says that the node carries pods.
	Ready bool `json:"ready"`
	// Waiting says that the agent has not reached the API since it started, and so does not know.
	Waiting bool `json:"waiting,omitempty"`
	// Reason says why the node does not carry pods.
	Reason string `json:"reason,omitempty"`
	// Failed names the steps of the pass that failed; docs/design/agent.md lists them.
	Failed []string `json:"failed,omitempty"`
	// Addresses are the node's own addresses, at most one of each family.
	Addresses []netip.Addr `json:"addresses"`
	// Plan is what the kernel should hold. It is computed from Interfaces and Config.
	Plan       podnet.Plan        `json:"plan"`
	Interfaces []podnet.Interface `json:"interfaces"`
	Config     netconf.Config     `json:"config"`
}

// Node is an agent's report on its node: what the kernel should hold, what it does hold, and which pod has which address.
type Node struct {
	Status
	Kernel podnet.State    `json:"kernel"`
	Pods   []podnet.PodEnd `json:"pods"`
	// Strays are routes to pods' addresses that lead to no pod's device.
	Strays []netip.Addr `json:"strays,omitempty"`
	Leases []Lease      `json:"leases"`
	// FastPath is the state of the path by which packets between pods bypass the stack.
	FastPath FastPath `json:"fastPath"`
	// Pools are the ranges from which the plugin allocates addresses. Usage says how full they are.
	Pools []ipam.Pool  `json:"pools"`
	Usage []ipam.Usage `json:"usage"`
}

// FastPath is the state of the fast path.
type FastPath struct {
	On     bool   `json:"on"`
	Reason string `json:"reason,omitempty"` // why it is off
	// Slow are addresses of pods whose packets take the stack although the fast path is on, with the reason.
	Slow map[netip.Addr]string `json:"slow,omitempty"`
	// Judged are addresses of pods that policies isolate and whose TCP connections take the fast path where policies allow them.
	Judged []netip.Addr `json:"judged,omitempty"`
	// Differences are those between what the kernel should hold for the fast path and what it does hold.
	Differences []string `json:"differences,omitempty"`
}

// Lease says which pod has which addresses, as the plugin recorded it.
type Lease struct {
	ContainerID string       `json:"containerID"`
	IfName      string       `json:"ifname"`
	Namespace   string       `json:"namespace"`
	Pod         string       `json:"pod"`
	UID         string       `json:"uid"`
	Device      string       `json:"device"`
	Pool        string       `json:"pool"`
	Addresses   []netip.Addr `json:"addresses"`
	Time        time.Time    `json:"time"`
}

// OneLine formats an error for a report, a status or the end of a sentence. It separates joined errors by semicolons.
func OneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
