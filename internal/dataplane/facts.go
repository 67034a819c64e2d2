package dataplane

import (
	"cmp"
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"github.com/fathom-network/fathom/internal/kube"
	"github.com/fathom-network/fathom/internal/netconf"
	"github.com/fathom-network/fathom/internal/podnet"
)

// What an agent says of its node in annotations, for the agents of the others.
const (
	// modeAnnotation is the mode by which the node sends to others.
	modeAnnotation = kube.AnnotationPrefix + "mode"
	// tunnelAnnotation is the tunnel by which the node receives, VNI:PORT, or "none".
	tunnelAnnotation = kube.AnnotationPrefix + "tunnel"
)

// facts are what the API says, as the plan takes it.
type facts struct {
	own      podnet.Node
	nodes    []podnet.Node
	config   podnet.Config
	problems []podnet.Problem
}

// readFacts turns objects into facts.
func readFacts(nodes []*corev1.Node, self string, c netconf.Config) facts {
	f := facts{config: podnet.Config{
		Mode: podnet.Mode(c.Mode), VNI: uint32(c.VNI), Port: uint16(c.Port), MTU: c.MTU,
		NonMasquerade: c.NonMasqueradeCIDRs, NoMasquerade4: !c.Masquerade, NoMasquerade6: !c.Masquerade,
	}}
	for _, n := range nodes {
		var addrs []string
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				addrs = append(addrs, a.Address)
			}
		}
		cidrs := n.Spec.PodCIDRs
		if len(cidrs) == 0 && n.Spec.PodCIDR != "" {
			cidrs = []string{n.Spec.PodCIDR}
		}
		node, problems := podnet.ParseNode(n.Name, n.CreationTimestamp.Time, addrs, cidrs)
		node.TunnelDown = n.Annotations[tunnelAnnotation] != tunnelOf(c)
		f.problems = append(f.problems, problems...)
		f.nodes = append(f.nodes, node)
		switch sends := podnet.Mode(n.Annotations[modeAnnotation]); {
		case n.Name == self:
			f.own = node
		case sends == podnet.VXLAN:
			// It may go on sending by vxlan until it has heard of another mode.
			f.config.Standby = true
		}
	}
	return f
}

// tunnelOf is what the annotation says of a tunnel that is up.
func tunnelOf(c netconf.Config) string { return fmt.Sprintf("%d:%d", c.VNI, c.Port) }

// announcement is what a node says of itself after a pass.
func announcement(plan podnet.Plan) map[string]string {
	tunnel := "none"
	if t := plan.Tunnel; t != nil {
		tunnel = fmt.Sprintf("%d:%d", t.VNI, t.Port)
	}
	return map[string]string{modeAnnotation: string(cmp.Or(plan.Mode, podnet.Auto)), tunnelAnnotation: tunnel}
}
