package ippool

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/netconf"
)

// What is asked for in annotations.
const (
	// PoolAnnotation names the pool that a pod's addresses come from, or those of all pods of a namespace.
	PoolAnnotation = netconf.AnnotationPrefix + "pool"
	// AddressesAnnotation are the addresses that a pod wants, at most one of each family, with commas between.
	AddressesAnnotation = netconf.AnnotationPrefix + "addresses"
)

// Wish is what a pod asks for. The zero value is nothing in particular.
type Wish struct {
	Pool      string
	Addresses []netip.Addr
	// From says which annotation names the pool.
	From string
}

// Refusal says why a pod does not get what it asks for.
type Refusal struct {
	Text string
	// Later says that it may get it when others have given something back.
	Later bool
}

func (e *Refusal) Error() string { return e.Text }

func refuse(later bool, format string, args ...any) error {
	return &Refusal{fmt.Sprintf(format, args...), later}
}

// ParseWish reads the annotations of a pod and of its namespace. The pod's go first. What cannot be read is an
// error: a pod that asks for an address gets that one or none.
func ParseWish(pod, namespace map[string]string) (Wish, error) {
	var w Wish
	for _, from := range []struct {
		of          string
		annotations map[string]string
	}{{"pod", pod}, {"namespace", namespace}} {
		value, found := from.annotations[PoolAnnotation]
		if !found {
			continue
		}
		w.Pool, w.From = strings.TrimSpace(value), from.of
		if !isName(w.Pool) {
			return Wish{}, refuse(false, "annotation %s of the %s: %.80q is no name of a pool; want something like public, or %s for the node's own range",
				PoolAnnotation, from.of, value, netconf.DefaultPool)
		}
		break
	}
	value, found := pod[AddressesAnnotation]
	if !found {
		return w, nil
	}
	// One that has addresses of its own is not bound to the namespace's pool, which nothing of the pod's names.
	if w.From == "namespace" {
		w.Pool, w.From = "", ""
	}
	for word := range strings.SplitSeq(value, ",") {
		word = strings.TrimSpace(word)
		a, err := netip.ParseAddr(word)
		if err != nil || a.Zone() != "" {
			return Wish{}, refuse(false, "annotation %s: %.80q is no address; want something like 10.50.0.7 or 10.50.0.7,fd00:50::7", AddressesAnnotation, word)
		}
		a = a.Unmap()
		for _, other := range w.Addresses {
			if inet.FamilyOf(other) == inet.FamilyOf(a) {
				return Wish{}, refuse(false, "annotation %s: %s and %s are both %s; a pod gets one address of a family", AddressesAnnotation, other, a, inet.FamilyOf(a))
			}
		}
		w.Addresses = append(w.Addresses, a)
	}
	return w, nil
}

// isName says whether an object of the API could have the name.
func isName(s string) bool {
	if s == "" || len(s) > 63 || strings.Trim(s, "-.") != s {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	})
}

// Grant is what a node does for a pod.
type Grant struct {
	// Pool is empty if any of the node's own ranges will do.
	Pool      string
	Addresses []netip.Addr
	// Fixed are those of the addresses that the node has to take a block of one address for.
	Fixed []netip.Addr
	// Ordinary are the families of which the pod gets an address of the node's blocks as it comes.
	Ordinary []Range
}

// Decide says what a pod on a node gets, or why it does not get what it asks for.
func (f Facts) Decide(w Wish, nodeName, namespace string, namespaceLabels map[string]string) (Grant, error) {
	if w.Pool == "" && len(w.Addresses) == 0 {
		return Grant{}, nil
	}
	if w.Pool == "" {
		var err error
		if w.Pool, err = f.poolOf(w.Addresses[0]); err != nil {
			return Grant{}, err
		}
	}
	g := Grant{Pool: w.Pool, Addresses: w.Addresses}
	if w.Pool == netconf.DefaultPool {
		return g, f.ownRange(w.Addresses, nodeName)
	}
	p, found := f.Pool(w.Pool)
	if !found {
		return Grant{}, refuse(false, "annotation %s of the %s: there is no IPPool %q%s", PoolAnnotation, w.From, w.Pool, f.names())
	}
	if why := f.Usable(p, nodeName); why != "" {
		return Grant{}, refuse(false, "%s", why)
	}
	if !p.namespaces.Matches(labels.Set(namespaceLabels)) {
		return Grant{}, refuse(false, "pool %q is not for pods of namespace %s: its namespaceSelector is %s", p.Name, namespace, p.namespaces)
	}
	for _, a := range w.Addresses {
		if !p.holds(a) {
			return Grant{}, refuse(false, "%s is not in pool %q, which has %s", a, p.Name, rangesText(p))
		}
		i := slices.IndexFunc(f.Blocks, func(b Block) bool { return b.Contains(a) })
		doubtful := slices.IndexFunc(f.Refused, func(r RefusedBlock) bool { return r.IsValid() && r.Contains(a) && f.within(r.Prefix) })
		switch {
		case i < 0 && doubtful >= 0:
			return Grant{}, refuse(true, "%s is in a block that should not be there: %s; delete it, or ask for another address", a, f.Refused[doubtful])
		case i < 0:
			g.Fixed = append(g.Fixed, a)
		case f.Blocks[i].Node != nodeName:
			return Grant{}, refuse(true, "%s is in block %s of node %s, which gives it back when none of its addresses was in use for a while; "+
				"keep the addresses of pods that move to other nodes in a pool of their own", a, f.Blocks[i].Prefix, f.Blocks[i].Node)
		}
	}
	for _, r := range p.Ranges {
		if !slices.ContainsFunc(w.Addresses, func(a netip.Addr) bool { return inet.FamilyOf(a) == r.Family() }) {
			g.Ordinary = append(g.Ordinary, r)
		}
	}
	return g, nil
}

// poolOf finds the pool that has an address.
func (f Facts) poolOf(a netip.Addr) (string, error) {
	for _, n := range f.nodes() {
		if inet.Contains(n.podCIDRs, a) {
			return netconf.DefaultPool, nil
		}
	}
	for _, p := range f.Pools {
		if p.Problem == nil && p.holds(a) {
			return p.Name, nil
		}
	}
	return "", refuse(false, "annotation %s: %s is in no node's podCIDR and in no IPPool%s", AddressesAnnotation, a, f.names())
}

// ownRange says why addresses are not of a node's own ranges.
func (f Facts) ownRange(addrs []netip.Addr, nodeName string) error {
	for _, a := range addrs {
		for _, n := range f.nodes() {
			if n.name != nodeName && inet.Contains(n.podCIDRs, a) {
				return refuse(false, "%s is in the podCIDR of node %s, and the pod is on node %s; ask for an address of an IPPool, or run the pod there", a, n.name, nodeName)
			}
		}
	}
	return nil
}

// names lists the pools there are, for who has asked for another.
func (f Facts) names() string {
	if len(f.Pools) == 0 {
		return "; there are no IPPools"
	}
	var names []string
	for _, p := range f.Pools {
		names = append(names, p.Name)
	}
	const most = 10
	if len(names) > most {
		names = append(names[:most], "...")
	}
	return "; there are " + strings.Join(names, ", ")
}

func rangesText(p Pool) string {
	var all []string
	for _, r := range p.Ranges {
		all = append(all, r.String())
	}
	return strings.Join(all, " and ")
}

// Full says that a pool has no block left, who has them, and what to do.
func (f Facts) Full(n Need, inUse, cooling, here uint64) error {
	taken, nodes := 0, map[string]bool{}
	count := func(b Block) {
		if b.IsValid() && b.Overlaps(n.Prefix) {
			taken++
			nodes[b.Node] = true
		}
	}
	for _, b := range f.Blocks {
		count(b)
	}
	for _, r := range f.Refused {
		count(r.Block)
	}
	return refuse(true, "pool %q is full: all of %s is in %d blocks of %d nodes, and of the %d addresses that this node has of it %d are in use and %d cool down; "+
		"wait for pods to go, let pods use another IPPool, or make one", n.Pool, n.Prefix, taken, len(nodes), here, inUse, cooling)
}
