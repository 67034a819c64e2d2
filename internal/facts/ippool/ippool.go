// Package ippool decides about the address pools of a cluster: which of them are usable, which node has which block, which
// block a node takes next and which it gives back. It is pure; the agent carries the decisions out.
package ippool

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/apinode"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/vip"
)

// Objects are what the API has to say of pools.
type Objects struct {
	Pools    []*v1alpha1.IPPool
	Blocks   []*v1alpha1.IPBlock
	Nodes    []*corev1.Node
	Services []*networkingv1.ServiceCIDR
	// AddressPools are the addresses of load balancers.
	AddressPools []*v1alpha1.AddressPool
}

// Facts follow from the objects.
type Facts struct {
	Pools []Pool // the oldest first
	// Blocks are those that nodes use: for routes, as pods' own ranges, and to give addresses out of. They are ordered
	// by prefix, and none overlaps another.
	Blocks []Block
	// Refused are all other blocks, which nodes ignore; judge.go.
	Refused []RefusedBlock
	// nodes is computed on first use: without pools it is not needed, and there may be thousands.
	nodes    func() []node
	services []serviceRange
}

// Pool is an IPPool as it was read.
type Pool struct {
	Name   string
	Ranges []Range // at most one of each family, IPv4 first
	// Problem says why it is not used; nil if it is.
	Problem  *Problem
	Disabled bool
	// Deleting is a pool that a finalizer keeps while blocks of it are left: see Finalizer.
	Deleting   bool
	nodes      labels.Selector
	namespaces labels.Selector
	balancers  []balancerRange // of AddressPools that are not younger
	object     *v1alpha1.IPPool
}

// Range is the part of a family.
type Range struct {
	netip.Prefix
	BlockBits int // the length of blocks' prefixes
}

// Family is that of the range.
func (r Range) Family() inet.Family { return inet.FamilyOf(r.Addr()) }

// Block is an IPBlock as it was read.
type Block struct {
	netip.Prefix
	Name  string
	UID   types.UID
	Pool  string
	Node  string
	Owner types.UID // of the Node that it was made for
	Fixed bool
	// Created is when the API server stored it, which clients cannot influence.
	Created time.Time
}

// Problem is why a pool is not used.
type Problem struct {
	Field  string // such as spec.ipv4.cidr
	Reason string // in one word
	Text   string
}

func (p *Problem) String() string { return p.Field + ": " + p.Text }

// The reasons.
const (
	InvalidField     = "InvalidField"
	Overlap          = "Overlap"          // with an older pool, or a node's podCIDR
	ServiceOverlap   = "ServiceOverlap"   // with a Service CIDR
	BalancerOverlap  = "BalancerOverlap"  // with an AddressPool that is not younger
	NodeAddressClash = "NodeAddressClash" // a node's own address is in the range
	NoSuchFamily     = "NoSuchFamily"     // nodes have no pods of it
	ReservedName     = "ReservedName"
)

// node is what pools need to know of a Node.
type node struct {
	name     string
	uid      types.UID
	labels   labels.Set
	podCIDRs []netip.Prefix
	addrs    []netip.Addr
}

// Read computes facts from objects. All agents come to the same result.
func Read(o Objects) Facts {
	f := Facts{nodes: sync.OnceValue(func() []node {
		nodes := make([]node, 0, len(o.Nodes))
		for _, n := range o.Nodes {
			nodes = append(nodes, readNode(n))
		}
		slices.SortFunc(nodes, func(a, b node) int { return cmp.Compare(a.name, b.name) })
		return nodes
	})}
	f.services = readServices(o.Services)
	balancers := readBalancers(o.AddressPools)
	pools := slices.Clone(o.Pools)
	slices.SortFunc(pools, func(a, b *v1alpha1.IPPool) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	for _, p := range pools {
		pool := readPool(p)
		pool.balancers = slices.DeleteFunc(slices.Clone(balancers), func(b balancerRange) bool { return pool.Created().Before(b.created) })
		if pool.Problem == nil {
			pool.Problem = f.clash(pool)
		}
		f.Pools = append(f.Pools, pool)
	}
	return f.WithBlocks(o.Blocks)
}

func readNode(n *corev1.Node) node {
	read := node{name: n.Name, uid: n.UID, labels: n.Labels, addrs: apinode.Addrs(n)}
	for _, s := range apinode.PodCIDRs(n) {
		if p, err := netip.ParsePrefix(s); err == nil {
			read.podCIDRs = append(read.podCIDRs, p.Masked())
		}
	}
	return read
}

// balancerRange is a range of addresses of load balancers.
type balancerRange struct {
	vip.Range
	pool    string
	created time.Time
}

func (b balancerRange) overlaps(p netip.Prefix) bool {
	return b.Contains(p.Addr()) || p.Contains(b.First)
}

// readBalancers reads AddressPools, those with a problem too: Services keep what they have of them.
func readBalancers(objects []*v1alpha1.AddressPool) []balancerRange {
	var ranges []balancerRange
	for _, p := range vip.Read(vip.Objects{Pools: objects}) {
		for _, r := range p.Ranges {
			ranges = append(ranges, balancerRange{r, p.Name, p.Object().CreationTimestamp.Time})
		}
	}
	return ranges
}

type serviceRange struct {
	netip.Prefix
	name    string
	created time.Time
}

func readServices(objects []*networkingv1.ServiceCIDR) []serviceRange {
	var ranges []serviceRange
	for _, o := range objects {
		for _, s := range o.Spec.CIDRs {
			if p, err := netip.ParsePrefix(s); err == nil {
				ranges = append(ranges, serviceRange{p.Masked(), o.Name, o.CreationTimestamp.Time})
			}
		}
	}
	slices.SortFunc(ranges, func(a, b serviceRange) int {
		return cmp.Or(a.Compare(b.Prefix), cmp.Compare(a.name, b.name))
	})
	return ranges
}

// What the size of a block is where the pool does not say.
var defaultBlockBits = map[inet.Family]int{inet.IPv4: 26, inet.IPv6: 122}

// Ranges that no pod can have an address of, as in package conflist.
var unusable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// readPool reads a pool by itself. The CRD's rules refuse most of what is a problem here, unless the API server is
// older than they.
func readPool(o *v1alpha1.IPPool) Pool {
	p := Pool{Name: o.Name, Disabled: o.Spec.Disabled, Deleting: o.DeletionTimestamp != nil, object: o}
	wrong := func(field, format string, args ...any) {
		if p.Problem == nil {
			p.Problem = &Problem{field, InvalidField, fmt.Sprintf(format, args...)}
		}
	}
	if o.Name == netconf.DefaultPool {
		p.Problem = &Problem{"metadata.name", ReservedName, fmt.Sprintf("%q is the pool of the nodes' own podCIDRs; give this one another name", o.Name)}
	}
	if o.Spec.IPv4 == nil && o.Spec.IPv6 == nil {
		wrong("spec", "a pool has a range of IPv4, of IPv6, or both")
	}
	for _, f := range inet.Families {
		from, field := o.Spec.IPv4, "spec.ipv4"
		if f == inet.IPv6 {
			from, field = o.Spec.IPv6, "spec.ipv6"
		}
		if from == nil {
			continue
		}
		r, err := netip.ParsePrefix(from.CIDR)
		if err != nil || r.Addr().Is4In6() || inet.FamilyOf(r.Addr()) != f {
			wrong(field+".cidr", "%q is no range of %s", from.CIDR, f)
			continue
		}
		bits := int(from.BlockSize)
		if bits == 0 {
			bits = max(defaultBlockBits[f], r.Bits())
		}
		switch i := slices.IndexFunc(unusable, r.Overlaps); {
		case r != r.Masked():
			wrong(field+".cidr", "%s has bits behind the prefix; want %s", r, r.Masked())
		case i >= 0:
			wrong(field+".cidr", "%s overlaps %s, which no pod can have an address of", r, unusable[i])
		case bits < r.Bits() || bits > r.Addr().BitLen():
			wrong(field+".blockSize", "a block of /%d is not a part of %s; want %d to %d", bits, r, r.Bits(), r.Addr().BitLen())
		default:
			p.Ranges = append(p.Ranges, Range{r, bits})
		}
	}
	var err error
	if p.nodes, err = selector(o.Spec.NodeSelector); err != nil {
		wrong("spec.nodeSelector", "%v", err)
	}
	if p.namespaces, err = selector(o.Spec.NamespaceSelector); err != nil {
		wrong("spec.namespaceSelector", "%v", err)
	}
	return p
}

// selector parses a selector. A missing one selects everything.
func selector(s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	read, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing(), err
	}
	return read, nil
}

// clash says what else has addresses of the pool. Of two pools the older one stays valid.
func (f *Facts) clash(p Pool) *Problem {
	for _, r := range p.Ranges {
		problem := func(reason, text string) *Problem {
			return &Problem{"spec." + strings.ToLower(r.Family().String()) + ".cidr", reason, r.String() + " " + text}
		}
		if reason, text := f.foreign(p, r.Prefix, f.services); reason != "" {
			return problem(reason, text)
		}
		if !f.hasFamily(r.Family()) {
			return problem(NoSuchFamily, fmt.Sprintf("is %s, and no node has podCIDRs of that family: its pods could not be reached", r.Family()))
		}
		for _, older := range f.Pools {
			if older.Problem != nil {
				continue
			}
			for _, other := range older.Ranges {
				if other.Overlaps(r.Prefix) {
					return problem(Overlap, fmt.Sprintf("overlaps %s of the older pool %s", other.Prefix, older.Name))
				}
			}
		}
	}
	return nil
}

// foreign says what besides pools has addresses of a prefix that lies in the pool, of Services those ranges that are given.
func (f *Facts) foreign(p Pool, r netip.Prefix, services []serviceRange) (reason, text string) {
	for _, s := range services {
		if s.Overlaps(r) {
			return ServiceOverlap, fmt.Sprintf("overlaps %s of ServiceCIDR %s", s.Prefix, s.name)
		}
	}
	for _, b := range p.balancers {
		if b.overlaps(r) {
			return BalancerOverlap, fmt.Sprintf("overlaps %s of AddressPool %s, which is not younger", b.Range, b.pool)
		}
	}
	for _, n := range f.nodes() {
		for _, c := range n.podCIDRs {
			if c.Overlaps(r) {
				return Overlap, fmt.Sprintf("overlaps %s, the podCIDR of node %s", c, n.name)
			}
		}
		for _, a := range n.addrs {
			if r.Contains(a) {
				return NodeAddressClash, fmt.Sprintf("holds %s, the address of node %s", a, n.name)
			}
		}
	}
	return "", ""
}

// hasFamily says whether nodes have pods of a family, or no pods at all yet.
func (f *Facts) hasFamily(family inet.Family) bool {
	hasPods := false
	for _, n := range f.nodes() {
		for _, c := range n.podCIDRs {
			if inet.FamilyOf(c.Addr()) == family {
				return true
			}
			hasPods = true
		}
	}
	return !hasPods
}

// Pool finds a pool by its name.
func (f Facts) Pool(name string) (Pool, bool) {
	i := slices.IndexFunc(f.Pools, func(p Pool) bool { return p.Name == name })
	if i < 0 {
		return Pool{}, false
	}
	return f.Pools[i], true
}

// Of returns the blocks that a node has and may use.
func (f Facts) Of(node string) []Block {
	return slices.DeleteFunc(slices.Clone(f.Blocks), func(b Block) bool { return b.Node != node })
}

// NodeUID returns a Node's UID, which distinguishes it from an earlier one of its name; empty if there is no such Node.
func (f Facts) NodeUID(name string) types.UID {
	if n := f.node(name); n != nil {
		return n.uid
	}
	return ""
}

func (f Facts) node(name string) *node {
	nodes := f.nodes()
	if i := slices.IndexFunc(nodes, func(n node) bool { return n.name == name }); i >= 0 {
		return &nodes[i]
	}
	return nil
}

// Usable says why a node may not assign addresses of the pool; empty if it may.
func (f Facts) Usable(p Pool, nodeName string) string {
	switch n := f.node(nodeName); {
	case p.Problem != nil:
		return fmt.Sprintf("pool %q is not used: %s", p.Name, p.Problem)
	case p.Deleting:
		return fmt.Sprintf("pool %q is being deleted and gives out no further address: ask for another pool", p.Name)
	case p.Disabled:
		return fmt.Sprintf("pool %q is disabled and gives out no further address: ask for another pool, or enable it", p.Name)
	case n == nil:
		return fmt.Sprintf("there is no Node %s", nodeName)
	case !p.nodes.Matches(n.labels):
		return fmt.Sprintf("pool %q is not for node %s: its nodeSelector is %s", p.Name, nodeName, p.nodes)
	}
	return ""
}

// Created is when the pool was made.
func (p Pool) Created() time.Time { return p.object.CreationTimestamp.Time }

// Range returns the part of a family.
func (p Pool) Range(f inet.Family) (Range, bool) {
	for _, r := range p.Ranges {
		if r.Family() == f {
			return r, true
		}
	}
	return Range{}, false
}

// holds reports whether the address is in the pool.
func (p Pool) holds(a netip.Addr) bool {
	return slices.ContainsFunc(p.Ranges, func(r Range) bool { return r.Contains(a) })
}

// condition returns the condition that says whether the pool is used.
func condition(p Pool, now time.Time) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.PoolValid, Status: metav1.ConditionTrue, Reason: "Valid", Message: "nodes take blocks as they need them",
		ObservedGeneration: p.object.Generation, LastTransitionTime: metav1.NewTime(now)}
	switch {
	case p.Problem != nil:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, p.Problem.Reason, p.Problem.String()
	case p.Deleting:
		c.Message = "it is being deleted: pods keep their addresses, and nobody gets another"
	case p.Disabled:
		c.Message = "it is disabled: pods keep their addresses, and nobody gets another"
	}
	return c
}
