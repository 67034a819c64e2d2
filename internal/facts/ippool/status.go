package ippool

import (
	"hash/fnv"
	"math"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
)

// Status is what the pool's status should be, and whether it is not so. A condition that stays keeps its time.
func (f Facts) Status(p Pool, now time.Time) (status v1alpha1.IPPoolStatus, differs bool) {
	have := p.object.Status
	status = v1alpha1.IPPoolStatus{Conditions: slices.Clone(have.Conditions)}
	meta.SetStatusCondition(&status.Conditions, condition(p, now))
	nodes := map[string]bool{}
	for _, r := range p.Ranges {
		u := &v1alpha1.IPPoolUsage{Addresses: saturate(ipam.Count(r.Prefix))}
		taken := uint64(0)
		for _, b := range f.Blocks {
			if b.Pool == p.Name && r.Overlaps(b.Prefix) {
				u.Blocks++
				taken = add(taken, ipam.Count(b.Prefix))
				nodes[b.Node] = true
			}
		}
		u.Taken = saturate(taken)
		if r.Family() == inet.IPv4 {
			status.IPv4 = u
		} else {
			status.IPv6 = u
		}
	}
	status.Nodes = int32(min(len(nodes), math.MaxInt32))
	return status, !equality.Semantic.DeepEqual(status, have)
}

func saturate(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// Turnstile is how long a node waits before it writes a pool's status, if nobody has: all agents know what it
// should be, and the one whose turn is first writes it at once.
func (f Facts) Turnstile(pool, node string) time.Duration {
	place := func(name string) uint64 {
		h := fnv.New64a()
		_, _ = h.Write([]byte(pool + " " + name))
		return h.Sum64()
	}
	rank, own := 0, place(node)
	for _, n := range f.nodes() {
		if place(n.name) < own {
			rank++
		}
	}
	return min(time.Duration(rank)*3*time.Second, time.Minute)
}

// Object is the IPPool that the pool was read from.
func (p Pool) Object() *v1alpha1.IPPool { return p.object }
