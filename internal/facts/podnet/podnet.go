// Package podnet is the network between the pods of different nodes: from what the API says of the nodes it works
// out what the kernel of one of them should hold, and what differs from what it does hold. docs/design/podnet.md
// says why it is as it is.
package podnet

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// What marks things in the kernel as ours.
const (
	// RouteProtocol is in each route of the plan; `ip route` shows it as "proto 251". The lab's own routes have
	// 250, those to this node's pods, which the CNI plugin makes, 252.
	RouteProtocol = 251
	// TunnelAlias is the alias of the vxlan device.
	TunnelAlias = "fathom: to pods of other nodes"
)

// Defaults of Config.
const (
	DefaultDevice = "fathom.vxlan"
	DefaultVNI    = 4242
	DefaultPort   = 4789 // IANA's, so that tcpdump and Wireshark take the packets apart unasked
)

// Mode says how packets get to pods of other nodes.
type Mode string

// The modes. The zero value is Auto.
const (
	Auto   Mode = "auto"   // Direct where the other node is on a segment of ours, VXLAN where it is not
	Direct Mode = "direct" // plain routes; nodes behind a router are not reached
	VXLAN  Mode = "vxlan"  // always wrapped, for a segment that only lets nodes' own addresses pass
)

// ParseMode reads a mode. Nothing means Auto.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case "":
		return Auto, nil
	case Auto, Direct, VXLAN:
		return m, nil
	}
	return "", fmt.Errorf("mode %q: want %s, %s or %s", s, Auto, Direct, VXLAN)
}

// Config is what the network's owner chooses for the whole cluster. The zero value is a good one.
type Config struct {
	Mode Mode
	// Underlay is the family of the packets around the packets. Unset, it is that of the oldest node's first
	// address, so that all nodes choose the same one.
	Underlay inet.Family
	Device   string // the vxlan device
	VNI      uint32
	Port     uint16
	// MTU is that of pods; 0 works it out.
	MTU int
	// Standby keeps the vxlan device where no route needs it, so that it receives from nodes that still, or
	// already, send by it: for changing the mode of a cluster node by node.
	Standby bool

	// PodRanges are the ranges that nodes' pod CIDRs come from, if known: then the pods of a node that this one
	// has not heard of yet are not masqueraded to either.
	PodRanges []netip.Prefix
	// NonMasquerade are destinations outside of the cluster that are to see pods' own addresses.
	NonMasquerade []netip.Prefix
	// LinkLocal are link-local and metadata addresses that pods' packets are forwarded to all the same.
	LinkLocal []netip.Prefix
	// NoMasquerade4 and NoMasquerade6 leave the packets of a family as they are.
	NoMasquerade4, NoMasquerade6 bool
}

// Node is what the network needs to know of a node.
type Node struct {
	Name string
	// Created settles disputes: the older node keeps what two claim. Equally old ones go by name.
	Created time.Time
	// Addrs are its own addresses, the one it prefers first.
	Addrs []netip.Addr
	// PodCIDRs are the ranges of its pods that are in its Node object. The first of each family holds the node's
	// tunnel address.
	PodCIDRs []netip.Prefix
	// Blocks are further ranges of its pods, parts of address pools. They may be single addresses.
	Blocks []netip.Prefix
	// TunnelDown says that the node does not receive by vxlan yet: in mode VXLAN it is sent to directly until it
	// does, if it is on a segment of ours, so that nothing is lost while a cluster changes its mode.
	TunnelDown bool
}

// Interface is a device by which this node reaches others.
type Interface struct {
	Name  string
	MTU   int
	Addrs []netip.Prefix // its addresses, each with the length of the prefix that is on the segment
}

// Plan is what the kernel of a node should hold.
type Plan struct {
	Node   string
	Mode   Mode
	PodMTU int
	Peers  []Peer // ordered by name
	State
}

// State is what a kernel holds, or should hold, for the network between nodes. Slices are sorted.
type State struct {
	Tunnel     *Tunnel // nil where there is none
	Routes     []Route
	Neighbours []Neighbour // of the tunnel
	Forwards   []Forward   // of the tunnel
	Sysctls    []Sysctl
	Masquerade Masquerade
	Guard      Guard
}

// Peer says how another node's pods are reached: by Direct, by VXLAN, or, where it is empty, not at all.
type Peer struct {
	Node       string
	IPv4, IPv6 Mode
}

// Tunnel is a vxlan device.
type Tunnel struct {
	Name  string
	VNI   uint32
	Port  uint16
	MAC   MAC
	MTU   int
	Local netip.Addr // the source of its outer packets; unset, the kernel chooses for each
	Addrs []netip.Addr
}

// Route is a route of the main table. It is one by way of Via, or an unreachable one.
type Route struct {
	To          netip.Prefix
	Via         netip.Addr
	Device      string
	Source      netip.Addr // of packets that start on the node
	Onlink      bool       // Via is taken to be on the segment, whatever the device's addresses say
	Unreachable bool
	Metric      uint32 // 0 is the kernel's default
}

// Neighbour is a permanent neighbour entry of the tunnel.
type Neighbour struct {
	Addr netip.Addr
	MAC  MAC
}

// Forward is an entry of the tunnel's forwarding database: where to send frames for an address.
type Forward struct {
	MAC MAC
	To  netip.Addr
}

// Sysctl is a setting below /proc/sys/net.
type Sysctl struct {
	Name  string // such as ipv4/ip_forward
	Value string
	// Instead, if set, is the one value that is replaced; others are left as they are.
	Instead string
	Why     string
}

// Masquerade says which packets of pods leave with the node's address: those from Sources to anything that is not
// in the other three. A family that is not masqueraded has no Sources.
type Masquerade struct {
	Sources []netip.Prefix // of this node's pods
	Pods    []netip.Prefix // of every node's pods
	Nodes   []netip.Addr   // nodes to which pods' packets go as they are
	Others  []netip.Prefix // destinations outside of the cluster that are to see pods' own addresses
}
