// Package networks has the kinds of pod network that a lab's cluster may have, one in each file, behind one interface. Package lab
// decides when each part is done; what is done is decided here.
package networks

import (
	"context"
	"net/netip"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/kit"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Network is a kind of pod network. Its parts are done in the order of the methods.
type Network interface {
	// Disk returns the files that a node has for the network before it boots, by their paths on the node.
	Disk(n *topology.Node) (map[string][]byte, error)
	// Wire returns the routes and rules that a node's network namespace needs in addition to its own addresses and routes.
	Wire(c Cluster, n *topology.Node) Wire
	// Step is the name of Install among the steps that `fathom up` shows; empty if there is nothing to install.
	Step() string
	// Install makes the network's objects. The API server may have only begun to serve; controllers is closed when the
	// cluster's controllers begin their work.
	Install(ctx context.Context, c Cluster, client *kube.Client, controllers <-chan struct{}) error
	// Ready reports whether the network makes nodes Ready. If it does not, the lab does not wait for them.
	Ready() bool
}

// Cluster is what a network is told of its cluster.
type Cluster struct {
	*topology.Cluster
	Lab *topology.Lab
	Kit kit.Kit
	API netip.AddrPort // of the API server, or the balancer in front of several
	CA  string         // the file with the certificates that the cluster's pods trust the API server by
}

// Wire is what a node's network namespace has for a network.
type Wire struct {
	Routes []link.Route
	// Uplink, if not nil, has packets of pods leave the cluster with the node's address.
	Uplink *ruleset.Uplink
}

// Of returns the network of a kind. A kind that this version does not know, of a lab that another version made, is like none:
// the lab does nothing for it.
func Of(kind topology.NetworkKind) Network {
	switch kind {
	case topology.NetworkFathom:
		return fathom{}
	case topology.NetworkBridge:
		return bridge{}
	case topology.NetworkFlannel:
		return flannel{}
	case topology.NetworkNone:
	}
	return none{}
}
