// Package answer is what agents say when they are asked: of their node, of Services, of load balancers' addresses.
// `fathom verify` compares it with what the API implies.
package answer

import (
	"net/netip"
	"strings"
	"time"

	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// Status is how the agent's last pass went.
type Status struct {
	// Ready says that the node carries pods.
	Ready bool `json:"ready"`
	// Waiting says that the agent has not seen the API since it started, and cannot tell.
	Waiting bool `json:"waiting,omitempty"`
	// Reason says why it does not.
	Reason string `json:"reason,omitempty"`
	// Failed names the steps of the pass that failed; docs/design/agent.md lists them.
	Failed []string `json:"failed,omitempty"`
	// Addresses are the node's own, one of each family.
	Addresses []netip.Addr `json:"addresses"`
	// Plan is what the kernel should hold, made of these devices and this configuration.
	Plan       podnet.Plan        `json:"plan"`
	Interfaces []podnet.Interface `json:"interfaces"`
	Config     netconf.Config     `json:"config"`
}

// Node is what an agent says of its node: what its kernel should hold, what it is found to hold, and who has which address.
type Node struct {
	Status
	Kernel podnet.State    `json:"kernel"`
	Pods   []podnet.PodEnd `json:"pods"`
	// Strays are routes to pods' addresses that lead to no pod's device.
	Strays []netip.Addr `json:"strays,omitempty"`
	Leases []Lease      `json:"leases"`
	// FastPath is what packets between pods go by, where they need not be seen by anything else.
	FastPath FastPath `json:"fastPath"`
	// Pools are the ranges that the plugin gives addresses from, and Usage how full they are.
	Pools []ipam.Pool  `json:"pools"`
	Usage []ipam.Usage `json:"usage"`
}

// FastPath is the short way of pods' packets.
type FastPath struct {
	On     bool   `json:"on"`
	Reason string `json:"reason,omitempty"` // why it is not
	// Slow are pods' addresses whose packets take the stack all the same, and why.
	Slow map[netip.Addr]string `json:"slow,omitempty"`
	// Differences are between what the agent wants the kernel to hold for it and what it does.
	Differences []string `json:"differences,omitempty"`
}

// Lease says who has addresses, as the plugin wrote it down.
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

// OneLine writes an error as it stands in an answer, in a status or after other words: errors that were joined are separated by
// semicolons.
func OneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }
