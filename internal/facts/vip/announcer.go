package vip

import (
	"cmp"
	"hash/fnv"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Exclude is the label of nodes that are left out while there are others.
// https://kubernetes.io/docs/reference/labels-annotations-taints/#node-kubernetes-io-exclude-from-external-load-balancers
const Exclude = "node.kubernetes.io/exclude-from-external-load-balancers"

// Node is a node that may answer for addresses.
type Node struct {
	Name     string
	Alive    bool
	Excluded bool // by its label
	Addrs    []netip.Addr
	Away     bool // its agent is, and its kernel does what it was told
}

// Target is a Service behind an address. With externalTrafficPolicy: Local, only its nodes count.
type Target = service.LoadBalanced

// Eligible returns the nodes that may attract packets to an address, sorted: all that live; of Services with
// externalTrafficPolicy: Local those that have a ready endpoint, and where several Services share the address, those
// that have one of most of them. targets may be of other addresses, too.
func Eligible(addr netip.Addr, targets []Target, nodes []Node) []string {
	serves := map[string]int{}
	known, isLocal := false, false
	for _, t := range targets {
		if !slices.Contains(t.Addrs, addr) && !slices.Contains(t.ExternalIPs, addr) {
			continue
		}
		known = true
		if isLocal = isLocal || t.Local; t.Local {
			for _, n := range t.Nodes {
				serves[n]++
			}
		}
	}
	if !known {
		return nil
	}
	var list []Node
	for _, n := range nodes {
		if n.Alive && (!isLocal || serves[n.Name] > 0) {
			list = append(list, n)
		}
	}
	if wanted := slices.DeleteFunc(slices.Clone(list), func(n Node) bool { return n.Excluded }); len(wanted) > 0 {
		list = wanted
	}
	most := 0
	for _, n := range list {
		most = max(most, serves[n.Name])
	}
	var names []string
	for _, n := range list {
		if serves[n.Name] == most {
			names = append(names, n.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// Announcer chooses the node that answers for an address on a segment, among those that are eligible; empty if there is
// none. All nodes come to the same result without communication (rendezvous hashing): when a node goes, only its addresses
// move, and a new one gets its share.
func Announcer(addr netip.Addr, eligible []string) string {
	best, most := "", uint64(0)
	for _, name := range eligible {
		score := weigh(addr, name)
		if best == "" || cmp.Or(cmp.Compare(score, most), cmp.Compare(name, best)) > 0 {
			best, most = name, score
		}
	}
	return best
}

func weigh(addr netip.Addr, node string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(node))
	b := addr.As16()
	h.Write(b[:])
	// The last bytes hardly affect FNV's upper bits: neighbouring addresses would go to the same node.
	x := h.Sum64()
	x = (x ^ x>>33) * 0xff51afd7ed558ccd
	x = (x ^ x>>33) * 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}
