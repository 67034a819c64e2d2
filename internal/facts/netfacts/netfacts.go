// Package netfacts reads what the API says of the pod network: objects come in, and what podnet plans with goes
// out. The agent of a node and `fathom verify` read the same facts by it.
package netfacts

import (
	"cmp"
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
)

// What an agent says of its node in annotations, for the agents of the others.
const (
	// ModeAnnotation is the mode by which the node sends to others.
	ModeAnnotation = netconf.AnnotationPrefix + "mode"
	// TunnelAnnotation is the tunnel by which the node receives, VNI:PORT, or "none".
	TunnelAnnotation = netconf.AnnotationPrefix + "tunnel"
)

// Facts are what a plan is made of, but for the node's own devices.
type Facts struct {
	Own      podnet.Node // the zero value if there is no such Node
	Nodes    []podnet.Node
	Config   podnet.Config
	Problems []podnet.Problem
}

// Read turns Nodes and the configuration into what the node named self plans with.
func Read(nodes []*corev1.Node, self string, c netconf.Config) Facts {
	f := Facts{Config: podnet.Config{
		Mode: c.Mode, VNI: uint32(c.VNI), Port: uint16(c.Port), MTU: c.MTU,
		NonMasquerade: c.NonMasqueradeCIDRs, NoMasquerade4: !c.Masquerade, NoMasquerade6: !c.Masquerade,
		LinkLocal: c.LinkLocal,
	}}
	tunnel := fmt.Sprintf("%d:%d", c.VNI, c.Port)
	f.Nodes = make([]podnet.Node, 0, len(nodes))
	for _, n := range nodes {
		node, problems := podnet.ParseNode(n.Name, n.CreationTimestamp.Time, apinode.Internal(n), apinode.PodCIDRs(n))
		node.TunnelDown = n.Annotations[TunnelAnnotation] != tunnel
		f.Problems = append(f.Problems, problems...)
		f.Nodes = append(f.Nodes, node)
		switch sends := podnet.Mode(n.Annotations[ModeAnnotation]); {
		case n.Name == self:
			f.Own = node
		case sends == podnet.VXLAN:
			// It may go on sending by vxlan until it has heard of another mode.
			f.Config.Standby = true
		}
	}
	return f
}

// WithBlocks adds to the nodes what they have of address pools.
func (f Facts) WithBlocks(blocks []ippool.Block) Facts {
	of := map[string][]netip.Prefix{}
	for _, b := range blocks {
		of[b.Node] = append(of[b.Node], b.Prefix)
	}
	for i := range f.Nodes {
		f.Nodes[i].Blocks = of[f.Nodes[i].Name]
	}
	f.Own.Blocks = of[f.Own.Name]
	return f
}

// Announcement is what a node says of itself when its kernel holds the plan.
func Announcement(plan podnet.Plan) map[string]string {
	tunnel := "none"
	if t := plan.Tunnel; t != nil {
		tunnel = fmt.Sprintf("%d:%d", t.VNI, t.Port)
	}
	return map[string]string{ModeAnnotation: string(cmp.Or(plan.Mode, podnet.Auto)), TunnelAnnotation: tunnel}
}
