package lab

import (
	"context"
	_ "embed"
	"errors"
	"fmt"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/machine"
)

// NodeState is what a node is found to be.
type NodeState struct {
	Name      string   `json:"name"`
	Cluster   string   `json:"cluster"`
	Role      string   `json:"role"`
	State     string   `json:"state"` // running or off
	Pid       int      `json:"pid,omitempty"`
	Addresses []string `json:"addresses"`
	PodCIDRs  []string `json:"podCIDRs"`
}

// Nodes returns the state of the nodes of a cluster, or of all clusters if the name is empty.
func (l *Lab) Nodes(cluster string) ([]NodeState, error) {
	var all []NodeState
	for i := range l.Clusters {
		c := &l.Clusters[i]
		if cluster != "" && c.Name != cluster {
			continue
		}
		for j := range c.Nodes {
			n := &c.Nodes[j]
			s := NodeState{Name: n.Name, Cluster: c.Name, Role: string(n.Role), State: "off"}
			for _, a := range l.NodeAddrs(c, n) {
				s.Addresses = append(s.Addresses, a.String())
			}
			for _, p := range n.PodCIDRs {
				s.PodCIDRs = append(s.PodCIDRs, p.String())
			}
			m, err := machine.Open(l.cgroup(n.Name))
			if err == nil {
				s.State, s.Pid = "running", m.Pid
			} else if !errors.Is(err, machine.ErrNotRunning) {
				return nil, err
			}
			all = append(all, s)
		}
	}
	if all == nil {
		_, err := l.Cluster(cluster)
		return nil, err
	}
	return all, nil
}

// startNode boots a node that has a disk, and its kubelet.
func (l *Lab) startNode(ctx context.Context, c *topology.Cluster, n *topology.Node) error {
	m, err := l.boot(ctx, c, n)
	if err != nil {
		return err
	}
	return startKubelet(ctx, m)
}

// StartNode boots a node that is off.
func (l *Lab) StartNode(ctx context.Context, name string) error {
	return l.change(name, func(c *topology.Cluster, n *topology.Node) error {
		if !l.built(c) {
			return fmt.Errorf("start node %s: %w; bring it up with `fathom up --name %s`", name, errNoBuild, l.Name)
		}
		return l.startNode(ctx, c, n)
	})
}

// StopNode shuts a node down: its processes are asked to end first.
func (l *Lab) StopNode(ctx context.Context, name string) error {
	return l.change(name, func(*topology.Cluster, *topology.Node) error {
		m, err := l.Machine(name)
		if errors.Is(err, machine.ErrNotRunning) {
			return nil
		}
		if err != nil {
			return err
		}
		return m.PowerOff(ctx)
	})
}

// KillNode cuts a node's power.
func (l *Lab) KillNode(ctx context.Context, name string) error {
	return l.change(name, func(*topology.Cluster, *topology.Node) error {
		// Its link first: the kernel ends the connections of processes that are killed, and a machine without power
		// says no such last word. Routers take it for a restart.
		if err := l.CutWire(name); err != nil && !errors.Is(err, machine.ErrNotRunning) {
			return err
		}
		return machine.Kill(ctx, l.cgroup(name))
	})
}

// change runs f for a node while no other command changes the lab.
func (l *Lab) change(node string, f func(*topology.Cluster, *topology.Node) error) error {
	c, n, err := l.Node(node)
	if err != nil {
		return err
	}
	unlock, err := lock(l.Paths, l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	return f(c, n)
}
