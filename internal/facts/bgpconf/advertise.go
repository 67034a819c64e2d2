package bgpconf

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/fathom-network/fathom/api/v1alpha1"
)

// Advertisements returns what a BGPPeer announces to its router: those of its spec, or the equivalent of spec.advertise.
func Advertisements(p *v1alpha1.BGPPeer) []v1alpha1.BGPAdvertisement {
	if len(p.Spec.Advertisements) > 0 {
		return p.Spec.Advertisements
	}
	var one v1alpha1.BGPAdvertisement
	if p.Spec.Advertise == nil {
		one.Addresses = []v1alpha1.BGPAddresses{v1alpha1.BGPPodCIDR}
	}
	for _, kind := range p.Spec.Advertise {
		switch kind {
		case v1alpha1.AdvertisePodCIDRs:
			one.Addresses = append(one.Addresses, v1alpha1.BGPPodCIDR)
		case v1alpha1.AdvertiseServiceAddresses:
			one.Addresses = append(one.Addresses, v1alpha1.BGPLoadBalancerIP)
		default:
			one.Addresses = append(one.Addresses, v1alpha1.BGPAddresses(kind)) // there is no such kind, which is told
		}
	}
	return []v1alpha1.BGPAdvertisement{one}
}

// ForServices reports whether a BGPPeer announces Services' addresses of one of these kinds.
func ForServices(p *v1alpha1.BGPPeer, kinds ...v1alpha1.BGPAddresses) bool {
	return slices.ContainsFunc(Advertisements(p), func(a v1alpha1.BGPAdvertisement) bool {
		return slices.ContainsFunc(a.Addresses, func(k v1alpha1.BGPAddresses) bool { return slices.Contains(kinds, k) })
	})
}

// advertisement is one as it was read.
type advertisement struct {
	pods        bool
	kinds       []v1alpha1.BGPAddresses // of Services
	pools       []string
	poolLabels  labels.Selector // nil if pools alone count
	services    labels.Selector
	communities []Community
	localPref   *uint32
	v4, v6      int // lengths of prefixes
}

// selects reports whether the advertisement selects an address.
func (a advertisement) selects(s ServiceAddress) bool {
	if !slices.Contains(a.kinds, s.Kind) || !a.services.Matches(s.Labels) {
		return false
	}
	return s.Kind == v1alpha1.BGPClusterIP || slices.Contains(a.pools, s.Pool) || a.poolLabels != nil && a.poolLabels.Matches(s.PoolLabels)
}

// prefix returns the prefix in which an address is announced.
func (a advertisement) prefix(addr netip.Addr) netip.Prefix {
	bits := a.v4
	if addr.Is6() {
		bits = a.v6
	}
	return netip.PrefixFrom(addr, bits).Masked()
}

// advertisement reads one. external says that the peer is of another AS.
func (r *reader) advertisement(spec v1alpha1.BGPAdvertisement, external bool) advertisement {
	a := advertisement{pools: spec.Pools, communities: r.communities(spec.Communities),
		v4: int(cmp.Or(spec.AggregationLength, 32)), v6: int(cmp.Or(spec.AggregationLengthV6, 128))}
	for _, kind := range spec.Addresses {
		switch kind {
		case v1alpha1.BGPPodCIDR:
			a.pods = true
		case v1alpha1.BGPLoadBalancerIP, v1alpha1.BGPExternalIP, v1alpha1.BGPClusterIP:
			a.kinds = append(a.kinds, kind)
		default:
			r.lack("advertise: there is no %q", kind)
		}
	}
	if a.v4 < 1 || a.v4 > 32 || a.v6 < 1 || a.v6 > 128 {
		r.refuse("advertisements: aggregationLength %d and aggregationLengthV6 %d: want 1 to 32 and 1 to 128", a.v4, a.v6)
	}
	a.services = r.selector("serviceSelector", spec.ServiceSelector)
	if spec.PoolSelector != nil || len(spec.Pools) == 0 {
		a.poolLabels = r.selector("poolSelector", spec.PoolSelector)
	}
	switch {
	case spec.LocalPref == nil:
	case external:
		r.refuse("advertisements: localPref is for a peer of the same AS; mark routes for others by communities")
	case *spec.LocalPref < 0 || *spec.LocalPref > 1<<32-1:
		r.refuse("advertisements: localPref %d: want 0 to 4294967295", *spec.LocalPref)
	default:
		pref := uint32(*spec.LocalPref)
		a.localPref = &pref
	}
	return a
}

// selector parses a selector. An error in it refuses the peer: an address that is announced by mistake attracts traffic.
func (r *reader) selector(field string, s *metav1.LabelSelector) labels.Selector {
	if s == nil {
		return labels.Everything()
	}
	read, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		r.refuse("advertisements: %s: %v", field, err)
		return labels.Nothing()
	}
	return read
}

func (r *reader) communities(list []string) []Community {
	var read []Community
	for _, s := range list {
		c, err := ParseCommunity(s)
		if err != nil {
			// A route without its community may go where it must not.
			r.refuse("%v", err)
			continue
		}
		read = append(read, c)
	}
	return read
}

// routes returns what is announced to the peer.
func (r *reader) routes(p Peer) []Route {
	found := map[netip.Prefix]*Route{}
	add := func(prefix netip.Prefix, a advertisement) *Route {
		route := found[prefix]
		if route == nil {
			route = &Route{Prefix: prefix}
			found[prefix] = route
		}
		route.Communities = append(route.Communities, a.communities...)
		if route.LocalPref == nil {
			route.LocalPref = a.localPref
		}
		return route
	}
	ofAll := r.communities(r.peer.Spec.Communities)
	for _, spec := range Advertisements(r.peer) {
		a := r.advertisement(spec, p.ASN != p.LocalASN)
		if r.refused {
			continue // nobody is told anything, and each mistake is
		}
		if a.pods {
			for _, prefix := range r.node.PodCIDRs {
				add(prefix, a)
			}
		}
		for _, s := range r.node.ServiceAddresses {
			if a.selects(s) {
				route := add(a.prefix(s.Addr), a)
				route.Addrs = append(route.Addrs, s.Addr)
			}
		}
	}
	session := p.Address.Addr()
	other := r.node.nextHop(session)
	var routes []Route
	for _, prefix := range slices.SortedFunc(maps.Keys(found), netip.Prefix.Compare) {
		route := found[prefix]
		slices.SortFunc(route.Addrs, netip.Addr.Compare)
		route.Addrs = slices.Compact(route.Addrs)
		route.Communities = append(route.Communities, ofAll...)
		slices.SortFunc(route.Communities, Community.compare)
		route.Communities = slices.Compact(route.Communities)
		switch {
		case len(route.Addrs) > 0 && !prefix.IsSingleIP() && (prefix.Contains(session) || slices.ContainsFunc(r.node.Addrs, prefix.Contains)):
			r.lack("%s is not announced: the router or this node is in it, who would not be reached any more; choose a greater aggregationLength", prefix)
			continue
		case prefix.Addr().Is4() == session.Is4(): // the session's own address is the next hop
		case other.IsValid():
			route.NextHop = other
		case session.Zone() != "": // an unnumbered link: RFC 8950
		default:
			r.lack("%s is not announced: this node has no address of its family to be the next hop", prefix)
			continue
		}
		routes = append(routes, *route)
	}
	return routes
}

// Aggregates returns the prefixes that a node announces for some of the addresses in them; packets for the others are for
// no Service.
func (s Speaker) Aggregates() []netip.Prefix {
	var all []netip.Prefix
	for _, p := range s.Peers {
		for _, r := range p.Routes {
			if len(r.Addrs) > 0 && !r.Prefix.IsSingleIP() {
				all = append(all, r.Prefix)
			}
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}

// nextHop is the address of the node that a router which speaks over one family reaches in the other: one of the link on
// which the router is, or, where that has none or the router is further away, the one that the node prefers. It is invalid
// if the node has none; to a router with a link-local address only those of the link count.
func (n Node) nextHop(router netip.Addr) netip.Addr {
	hop := func(a netip.Addr) bool {
		return a.Is4() != router.Is4() && a.IsGlobalUnicast() && !a.Is4In6()
	}
	var linked []netip.Addr
	length := -1
	for _, link := range n.Links {
		var own []netip.Addr
		for _, p := range link.Addrs {
			if hop(p.Addr()) {
				own = append(own, p.Addr())
			}
		}
		if router.Zone() != "" && router.Zone() == link.Device {
			linked = own
		}
		for _, p := range link.Addrs {
			if p.Contains(router) && p.Bits() > length { // never of a router with a zone
				linked, length = own, p.Bits()
			}
		}
	}
	// Of several on a link the one that the cluster knows: others may be there for a while.
	for _, a := range n.Addrs {
		if slices.Contains(linked, a) {
			return a
		}
	}
	if len(linked) > 0 {
		return linked[0]
	}
	if i := slices.IndexFunc(n.Addrs, hop); i >= 0 && router.Zone() == "" {
		return n.Addrs[i]
	}
	return netip.Addr{}
}
