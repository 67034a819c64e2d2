package networks

import (
	"context"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// none is the network that a user brings.
type none struct{ nothing }

// Ready implements Network: the nodes wait for a user.
func (none) Ready() bool { return false }

// nothing does nothing for any part: a network is this and what it does for some.
type nothing struct{}

// Disk implements Network.
func (nothing) Disk(*topology.Node) (map[string][]byte, error) { return nil, nil }

// Wire implements Network.
func (nothing) Wire(Cluster, *topology.Node) Wire { return Wire{} }

// Step implements Network.
func (nothing) Step() string { return "" }

// Install implements Network.
func (nothing) Install(context.Context, Cluster, *kube.Client, <-chan struct{}) error { return nil }

// Ready implements Network.
func (nothing) Ready() bool { return true }
