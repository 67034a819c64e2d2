package verify

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/answer"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/facts/ippool"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/watch/kube"
)

// Addresses says which pods have which addresses in a cluster.
type Addresses struct {
	Pools  []NodePool  `json:"pools"`
	Leases []NodeLease `json:"leases"`
	// IPPools and Blocks are the pools besides the nodes' own ranges.
	IPPools []PoolState  `json:"ipPools,omitempty"`
	Blocks  []BlockState `json:"blocks,omitempty"`
	// Problems names nodes whose agents did not answer.
	Problems []string `json:"problems,omitempty"`
}

// NodePool is a node's part of a pool.
type NodePool struct {
	Node   string         `json:"node"`
	Ranges []netip.Prefix `json:"ranges"`
	ipam.Usage
}

// PoolState is an IPPool, and how much of it nodes have taken.
type PoolState struct {
	Pool   string                 `json:"pool"`
	Ranges []netip.Prefix         `json:"ranges"`
	State  string                 `json:"state"` // Valid, Disabled, or the problem
	Status []v1alpha1.IPPoolUsage `json:"usage"`
	Nodes  int32                  `json:"nodes"`
}

// BlockState is a block, and how full it is.
type BlockState struct {
	Block netip.Prefix `json:"block"`
	Pool  string       `json:"pool"`
	Node  string       `json:"node"`
	Fixed bool         `json:"fixed,omitempty"`
	Size  uint64       `json:"size"`
	InUse uint64       `json:"inUse"`
	// Refused says why no node uses it; empty if it is used.
	Refused string `json:"refused,omitempty"`
}

// NodeLease is an address in use, or two of both families.
type NodeLease struct {
	Node string `json:"node"`
	answer.Lease
}

// ReadAddresses asks the agents of all nodes.
func ReadAddresses(ctx context.Context, client *kube.Client) (Addresses, error) {
	a := Addresses{Pools: []NodePool{}, Leases: []NodeLease{}}
	agents, err := findAgents(ctx, client)
	if err != nil {
		return a, err
	}
	states, failed := ask[answer.Node](ctx, client, agents, stateVerb)
	for node, err := range failed {
		a.Problems = append(a.Problems, fmt.Sprintf("node %s: %s", node, answer.OneLine(err)))
	}
	for node, s := range states {
		for _, u := range s.Usage {
			var ranges []netip.Prefix
			for _, p := range s.Pools {
				if p.Name == u.Pool {
					ranges = append(ranges, p.Of(u.Family)...)
				}
			}
			a.Pools = append(a.Pools, NodePool{node, ranges, u})
		}
		for _, l := range s.Leases {
			a.Leases = append(a.Leases, NodeLease{node, l})
		}
	}
	c, err := readCluster(ctx, client)
	if err != nil {
		return a, err
	}
	a.readPools(c)
	slices.Sort(a.Problems)
	slices.SortFunc(a.Pools, func(x, y NodePool) int {
		return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Pool, y.Pool), cmp.Compare(x.Family, y.Family))
	})
	slices.SortFunc(a.Leases, func(x, y NodeLease) int {
		return cmp.Or(cmp.Compare(x.Node, y.Node), cmp.Compare(x.Namespace, y.Namespace), cmp.Compare(x.Pod, y.Pod))
	})
	return a, nil
}

// readPools adds pools and blocks, after leases were read.
func (a *Addresses) readPools(c Cluster) {
	f := c.pools()
	for _, p := range f.Pools {
		s := PoolState{Pool: p.Name, State: v1alpha1.PoolValid}
		switch {
		case p.Problem != nil:
			s.State = p.Problem.String()
		case p.Deleting:
			s.State = "Deleting"
		case p.Disabled:
			s.State = "Disabled"
		}
		if valid := meta.FindStatusCondition(p.Object().Status.Conditions, v1alpha1.PoolValid); valid != nil && valid.Status == metav1.ConditionFalse {
			s.State = valid.Message
		}
		status, _ := f.Status(p, time.Time{})
		s.Nodes = status.Nodes
		for _, r := range p.Ranges {
			s.Ranges = append(s.Ranges, r.Prefix)
			if r.Family() == inet.IPv4 {
				s.Status = append(s.Status, *status.IPv4)
			} else {
				s.Status = append(s.Status, *status.IPv6)
			}
		}
		a.IPPools = append(a.IPPools, s)
	}
	add := func(b ippool.Block, refused string) {
		s := BlockState{Block: b.Prefix, Pool: b.Pool, Node: b.Node, Fixed: b.Fixed, Size: ipam.Count(b.Prefix), Refused: refused}
		for _, l := range a.Leases {
			for _, x := range l.Addresses {
				if l.Node == b.Node && b.Contains(x) {
					s.InUse++
				}
			}
		}
		a.Blocks = append(a.Blocks, s)
	}
	for _, b := range f.Blocks {
		add(b, "")
	}
	for _, r := range f.Refused {
		if r.IsValid() {
			add(r.Block, r.Text)
		}
	}
}

// HeldError says that an address belongs to an existing pod.
type HeldError struct {
	Address netip.Addr
	Pod     string
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("%s is the address of pod %s, which exists", e.Address, e.Pod)
}

// Release takes back an address on the node that holds it. Without force, it refuses if the API still has the pod.
func Release(ctx context.Context, client *kube.Client, address netip.Addr, force bool) (NodeLease, error) {
	a, err := ReadAddresses(ctx, client)
	if err != nil {
		return NodeLease{}, err
	}
	i := slices.IndexFunc(a.Leases, func(l NodeLease) bool { return slices.Contains(l.Addresses, address) })
	if i < 0 {
		return NodeLease{}, fmt.Errorf("no node holds %s: see `fathom ipam show`", address)
	}
	l := a.Leases[i]
	c, err := readCluster(ctx, client)
	if err != nil {
		return l, err
	}
	for _, p := range c.Pods {
		if p.Namespace == l.Namespace && p.Name == l.Pod && p.Spec.NodeName == l.Node && !finished(p) && (l.UID == "" || l.UID == string(p.UID)) && !force {
			return l, &HeldError{address, l.Namespace + "/" + l.Pod}
		}
	}
	agents, err := findAgents(ctx, client)
	if err != nil {
		return l, err
	}
	agent, found := agents[l.Node]
	if !found {
		return l, fmt.Errorf("no agent runs on node %s, which holds %s", l.Node, address)
	}
	var out, stderr bytes.Buffer
	if err := client.Exec(ctx, agent, netconf.AgentContainer, nil, &out, &stderr, netconf.AgentProgram, "release", address.String()); err != nil {
		return l, fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	return l, nil
}

// CheckAddresses returns problems with addresses: two pods that have one, pods whose addresses differ from their leases,
// and leases without a pod.
func CheckAddresses(ctx context.Context, client *kube.Client) ([]string, error) {
	r, err := readTwice(ctx, client, podsQuestion(func(c Cluster, node string, s answer.Node) []podnet.Difference {
		d := differ{node: node}
		d.addresses(c.Pods, s)
		d.blocks(c.pools(), s)
		return d.found
	}))
	if err != nil {
		return nil, err
	}
	var found []string
	for node, differences := range r.differences {
		for _, d := range differences {
			found = append(found, node+": "+d)
		}
	}
	slices.Sort(found)
	for _, node := range r.nodes {
		if why, unread := r.unread[node]; unread {
			found = append(found, node+": "+why)
		}
	}
	return found, nil
}
