// Package vip decides about the addresses of Services of type LoadBalancer: which pools are usable, which Service has which
// address, and which node answers for it. It is pure: package controller writes the results for Services to the API, and
// the agents apply those for nodes.
package vip

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/netconf"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Settings of Services.
const (
	// Class is the loadBalancerClass of Services that are ours. Those without a class are, too.
	Class = netconf.AnnotationPrefix + "pool"
	// AddressAnnotation requests an address, or one of each family, separated by a comma.
	AddressAnnotation = netconf.AnnotationPrefix + "address"
	// PoolAnnotation names the pool from which a Service wants its addresses.
	PoolAnnotation = netconf.AnnotationPrefix + "address-pool"
	// ShareAnnotation is a key: Services of a namespace with the same one may have the same address.
	ShareAnnotation = netconf.AnnotationPrefix + "share-address"
	// Owner is the field manager that marks a Service's status as ours.
	Owner = "fathom-controller"
)

// Objects are what the API has to say of pools.
type Objects struct {
	Pools    []*v1alpha1.AddressPool
	Nodes    []*corev1.Node
	Services []*networkingv1.ServiceCIDR
	PodPools []*v1alpha1.IPPool
}

// Pools are the AddressPools as they were read, the oldest first.
type Pools []Pool

// Pool is an AddressPool as it was read.
type Pool struct {
	Name   string
	Ranges []Range // that make sense, in the order in which they are written
	// Problem says why it assigns no further addresses; nil if it does. Services keep what they have: a new node whose
	// range overlaps the pool takes nothing away.
	Problem    *Problem
	AutoAssign bool
	namespaces labels.Selector
	services   labels.Selector
	selects    bool // that it is for some Services only
	object     *v1alpha1.AddressPool
	taken      map[netip.Addr]bool // nodes' own addresses
}

// Range is a range of addresses, both ends among them.
type Range struct{ First, Last netip.Addr }

func (r Range) String() string { return r.First.String() + "-" + r.Last.String() }

// Contains says whether an address is in the range.
func (r Range) Contains(a netip.Addr) bool {
	return a.BitLen() == r.First.BitLen() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

func (r Range) overlaps(o Range) bool { return o.Contains(r.First) || r.Contains(o.First) }

// size is the number of addresses, at most 2^63-1.
func (r Range) size() int64 {
	a, b := r.First.As16(), r.Last.As16()
	var n uint64
	for i := range a {
		// The difference, byte by byte. A borrow comes out right in the end, for the sum is modulo 2^64.
		if i < 8 && a[i] != b[i] {
			return math.MaxInt64
		}
		n = n<<8 + uint64(b[i]) - uint64(a[i])
	}
	if n >= math.MaxInt64 {
		return math.MaxInt64
	}
	return int64(n) + 1
}

// Problem is why a pool gives no further address.
type Problem struct {
	Field  string // such as spec.addresses[0]
	Reason string // in one word
	Text   string
}

func (p *Problem) String() string { return p.Field + ": " + p.Text }

// The reasons.
const (
	InvalidField     = "InvalidField"
	Overlap          = "Overlap"          // with an older pool, or itself
	PodOverlap       = "PodOverlap"       // with a range of pods' addresses
	ServiceOverlap   = "ServiceOverlap"   // with a Service CIDR
	NodeAddressClash = "NodeAddressClash" // a node's own address is in the range
)

// Read reads pools from objects.
func Read(o Objects) Pools {
	objects := slices.SortedFunc(slices.Values(o.Pools), func(a, b *v1alpha1.AddressPool) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	foreign := readForeign(o)
	pools := make(Pools, 0, len(objects))
	for _, object := range objects {
		p := readPool(object)
		for i, r := range p.Ranges {
			field := fmt.Sprintf("spec.addresses: %s", r)
			for _, other := range p.Ranges[:i] {
				if r.overlaps(other) {
					p.wrong(field, Overlap, "overlaps %s of the same pool: leave one of the two out", other)
				}
			}
			for _, older := range pools {
				for _, other := range older.Ranges {
					if r.overlaps(other) {
						p.wrong(field, Overlap, "overlaps %s of AddressPool %s, which is older: choose other addresses", other, older.Name)
					}
				}
			}
			for _, f := range foreign {
				if !r.overlaps(f.Range) || object.CreationTimestamp.Time.Before(f.created) {
					continue
				}
				if f.reason == NodeAddressClash {
					p.taken[f.First] = true
				}
				p.wrong(field, f.reason, "overlaps %s: choose other addresses", f.what)
			}
		}
		pools = append(pools, p)
	}
	return pools
}

// foreign is a range that is no load balancer's to have.
type foreign struct {
	Range
	reason, what string
	// created is set of what gives way to an older AddressPool. That is an IPPool: package ippool has the same rule, and of
	// two pools that were made in the same second neither is used.
	created time.Time
}

func readForeign(o Objects) []foreign {
	var all []foreign
	created := map[string]time.Time{}
	for _, p := range o.PodPools {
		created[p.Name] = p.CreationTimestamp.Time
	}
	for _, r := range Reserved(o) {
		f := foreign{Range: rangeOf(r.Prefix)}
		switch r.Owner {
		case service.ReservedServiceCIDR:
			f.reason, f.what = ServiceOverlap, fmt.Sprintf("%s, which is Services' (ServiceCIDR %s)", r.Prefix, r.Name)
		case service.ReservedIPPool:
			f.reason, f.what, f.created = PodOverlap, fmt.Sprintf("%s, which is pods' (IPPool %s)", r.Prefix, r.Name), created[r.Name]
		case service.ReservedPodCIDR:
			f.reason, f.what = PodOverlap, fmt.Sprintf("%s, which is pods' of node %s", r.Prefix, r.Name)
		case service.ReservedNode:
			f.reason, f.what = NodeAddressClash, fmt.Sprintf("%s, which is node %s's own address", r.Addr(), r.Name)
		}
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b foreign) int { return cmp.Compare(a.what, b.what) })
	return all
}

// Addresses that no Service can have.
var unusable = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// readPool reads a pool by itself.
func readPool(o *v1alpha1.AddressPool) Pool {
	p := Pool{Name: o.Name, AutoAssign: o.Spec.AutoAssign == nil || *o.Spec.AutoAssign, object: o, taken: map[netip.Addr]bool{}}
	for i, s := range o.Spec.Addresses {
		field := fmt.Sprintf("spec.addresses[%d]", i)
		r, err := ParseRange(s)
		if err != nil {
			p.wrong(field, InvalidField, "%v", err)
			continue
		}
		for _, u := range unusable {
			if r.overlaps(rangeOf(u)) {
				err = fmt.Errorf("%q holds addresses of %s, which no Service can have", s, u)
				p.wrong(field, InvalidField, "%v", err)
				break
			}
		}
		if err == nil {
			p.Ranges = append(p.Ranges, r)
		}
	}
	if len(o.Spec.Addresses) == 0 {
		p.wrong("spec.addresses", InvalidField, "a pool without addresses is of no use: add some, such as 192.0.2.16/28")
	}
	selector := func(field string, s *metav1.LabelSelector) labels.Selector {
		if s == nil {
			return labels.Everything()
		}
		read, err := metav1.LabelSelectorAsSelector(s)
		if err != nil {
			p.wrong(field, InvalidField, "%v", err)
			return labels.Everything() // nobody gets an address, and nobody loses one
		}
		p.selects = true
		return read
	}
	p.namespaces = selector("spec.namespaceSelector", o.Spec.NamespaceSelector)
	p.services = selector("spec.serviceSelector", o.Spec.ServiceSelector)
	return p
}

// wrong records the first problem.
func (p *Pool) wrong(field, reason, format string, args ...any) {
	if p.Problem == nil {
		p.Problem = &Problem{field, reason, fmt.Sprintf(format, args...)}
	}
}

// ParseRange parses 192.0.2.16/28 or 192.0.2.16-192.0.2.31.
func ParseRange(s string) (Range, error) {
	if from, to, isRange := strings.Cut(s, "-"); isRange {
		a, errA := netip.ParseAddr(strings.TrimSpace(from))
		b, errB := netip.ParseAddr(strings.TrimSpace(to))
		switch {
		case errA != nil || errB != nil || a.Zone() != "" || b.Zone() != "" || a.Is4In6() || b.Is4In6():
			return Range{}, fmt.Errorf("%q is no range: want something like 192.0.2.16-192.0.2.31", s)
		case a.BitLen() != b.BitLen():
			return Range{}, fmt.Errorf("%q begins in one family and ends in another", s)
		case b.Less(a):
			return Range{}, fmt.Errorf("%q ends before it begins: write the lower address first", s)
		}
		return Range{a, b}, nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || p.Addr().Is4In6():
		return Range{}, fmt.Errorf("%q is neither a CIDR such as 192.0.2.16/28 nor a range such as 192.0.2.16-192.0.2.31", s)
	case p != p.Masked():
		return Range{}, fmt.Errorf("%q has bits behind the prefix: want %s, or %s/%d for one address", s, p.Masked(), p.Addr(), p.Addr().BitLen())
	}
	return rangeOf(p), nil
}

// rangeOf returns the addresses of a prefix.
func rangeOf(p netip.Prefix) Range {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 1 << (7 - bit%8)
	}
	end, _ := netip.AddrFromSlice(last)
	return Range{p.Addr(), end}
}

// Contains reports whether an address is in one of the pools, even an invalid one.
func (p Pools) Contains(a netip.Addr) bool { return p.Of(a) != nil }

// Of returns the pool that an address belongs to, or nil: the oldest that has it.
func (p Pools) Of(a netip.Addr) *Pool {
	for i := range p {
		if p[i].contains(a) {
			return &p[i]
		}
	}
	return nil
}

// Labels are the AddressPool's own.
func (p *Pool) Labels() labels.Set { return p.object.Labels }

func (p *Pool) contains(a netip.Addr) bool {
	return slices.ContainsFunc(p.Ranges, func(r Range) bool { return r.Contains(a) })
}

// hasFamily reports whether a pool has addresses of a family.
func (p *Pool) hasFamily(f corev1.IPFamily) bool {
	return slices.ContainsFunc(p.Ranges, func(r Range) bool { return familyOf(r.First) == f })
}

func familyOf(a netip.Addr) corev1.IPFamily { return corev1.IPFamily(inet.FamilyOf(a).String()) }
