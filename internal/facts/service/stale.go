package service

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Index finds frontends by destination, and decides which tracked flows are stale: those that lead to a former endpoint, or that
// bypass the Service that they are addressed to. Index is not safe for concurrent use.
type Index struct {
	frontends map[Key]Frontend
	nodeAddrs map[netip.Addr]struct{}
	ranges    []netip.Prefix
	others    map[netip.Addr]struct{}
	// gone holds removed frontends, with the number of sweeps until they are dropped.
	gone map[Key]int
}

// sweepsGone is the number of sweeps after which a removed frontend is dropped. One would do, if no packet were in the kernel
// during the sweep.
const sweepsGone = 2

// NewIndex returns an index of a plan's frontends. ranges are the ServiceCIDRs: a translated flow to an address there that is not
// a frontend belongs to a former frontend, perhaps of the time before this program started. others are addresses in ranges that
// another proxy serves, such as those of Services with the label service.kubernetes.io/service-proxy-name.
//
// The plan has to be complete: flows to Services that are missing in it count as stale.
func NewIndex(p Plan, ranges []netip.Prefix, others []netip.Addr) *Index {
	x := &Index{frontends: make(map[Key]Frontend, len(p.Frontends)), ranges: slices.Clone(ranges), gone: map[Key]int{}}
	for _, f := range p.Frontends {
		x.frontends[f.Key] = f
	}
	x.nodeAddrs, x.others = addrSet(p.NodePortAddrs), addrSet(others)
	return x
}

func addrSet(addrs []netip.Addr) map[netip.Addr]struct{} {
	s := make(map[netip.Addr]struct{}, len(addrs))
	for _, a := range addrs {
		s[a] = struct{}{}
	}
	return s
}

// Apply applies a change of a Service's frontends. Afterwards the index is what NewIndex returns for the new plan, and also knows
// the removed frontends.
func (x *Index) Apply(c Change) {
	for _, f := range c.Old {
		// Another Service may have the key by now.
		if have, found := x.frontends[f.Key]; found && have.Service == f.Service {
			delete(x.frontends, f.Key)
			x.gone[f.Key] = sweepsGone
		}
	}
	for _, f := range c.New {
		x.frontends[f.Key] = f
		delete(x.gone, f.Key)
	}
}

// Replace changes the index to that of another plan, and keeps the removed frontends, as Apply does.
func (x *Index) Replace(p Plan, ranges []netip.Prefix, others []netip.Addr) {
	next := NewIndex(p, ranges, others)
	next.gone = x.gone
	for key := range x.frontends {
		next.gone[key] = sweepsGone
	}
	for key := range next.frontends {
		delete(next.gone, key)
	}
	*x = *next
}

// Swept records that the caller has checked all flows. After two sweeps the index drops a removed frontend, since its address and
// port may then belong to something else, such as a host port.
func (x *Index) Swept() {
	for key, left := range x.gone {
		if left > 1 {
			x.gone[key] = left - 1
		} else {
			delete(x.gone, key)
		}
	}
}

// Find returns the frontend for packets to an address and port.
func (x *Index) Find(protocol Protocol, to netip.AddrPort) (Frontend, bool) {
	key := Key{to.Addr(), protocol, to.Port()}
	if f, found := x.frontends[key]; found {
		return f, true
	}
	if !x.atNode(to.Addr()) {
		return Frontend{}, false
	}
	f, found := x.frontends[nodePortKey(key)]
	return f, found
}

// Serves reports whether there is a frontend for packets to an address and port, or was one until recently. Stale and Ended apply
// to flows of these only.
func (x *Index) Serves(protocol Protocol, to netip.AddrPort) bool {
	_, found := x.Find(protocol, to)
	return found || x.hasGone(Key{to.Addr(), protocol, to.Port()})
}

// Stale says whether a tracked flow has to be deleted, so that its next packet counts as the first one. to is the original
// destination, answers is the source of the replies, and translated says whether a DNAT, ours or another one, makes them
// differ. It costs one map look-up, or two if there is no frontend.
//
// A TCP flow is never stale: a connection cannot continue with another endpoint, and only the old one can reset it.
func (x *Index) Stale(protocol Protocol, to, answers netip.AddrPort, translated bool) bool {
	if protocol != UDP && protocol != SCTP {
		return false
	}
	f, found := x.Find(protocol, to)
	switch {
	case found && translated:
		return !includes(f.Inside, answers) && !includes(f.Outside, answers)
	case found:
		// The flow began before there were endpoints, or before this program started. It leads nowhere, and lasts as long as its
		// client sends. At a node's own address the node itself may answer, so such a flow stays.
		return protocol == UDP && f.Kind != NodePort && len(f.Inside.Endpoints)+len(f.Outside.Endpoints) > 0
	case !translated:
		return false
	}
	key := Key{to.Addr(), protocol, to.Port()}
	return x.hasGone(key) || x.inRanges(to.Addr())
}

// Life is the state of an endpoint of a Service. The zero value is an endpoint that left its Service for an unknown reason.
type Life struct {
	Present bool // the Service has it, in any condition
	Serving bool // for new clients, or for its existing ones only
	Gone    bool // the Service does not have it any more, and its pod is gone
}

// Lives returns the state of an endpoint.
type Lives func(service Name, endpoint netip.AddrPort) Life

// Ended reports whether a flow has to end, given the state of its endpoint. A UDP or SCTP flow ends if it is stale and its endpoint
// no longer serves. An endpoint that gets no new flows, because it terminates or because others are nearer, keeps its existing
// ones. A TCP connection ends if its endpoint's pod is gone: the client's next packet then reaches another endpoint, which resets
// the unknown connection, so that the client does not wait for a timeout. While the pod lives, the connection lives, whatever
// happens to the Service.
func (x *Index) Ended(protocol Protocol, to, answers netip.AddrPort, translated bool, lives Lives) bool {
	if protocol == TCP {
		return translated && x.Cut(protocol, to, answers, lives)
	}
	if !x.Stale(protocol, to, answers, translated) { // this is the common case, and all flows are checked
		return false
	}
	f, found := x.Find(protocol, to)
	return !found || !lives(f.Service, answers).Serving
}

// DNSPort is the port of DNS. Connected UDP sockets to a Service's DNS port are translated to an endpoint, others are not
// (connect.c of package connect).
const DNSPort = 53

// Cut says whether a socket that connect() sent to an endpoint instead of a frontend has to be destroyed. It is the rule of Ended for
// sockets without an entry in connection tracking. A connected UDP socket cannot move to another endpoint. A socket to the DNS
// port is destroyed when its endpoint no longer serves, since resolvers open another one. Other UDP sockets come from versions
// that translated all of them. Their programs need them for longer, so they are destroyed when the endpoint has left the Service,
// ready or not. A socket that leads to the node's own address instead of a loopback one stays, since the rules for packets move
// it.
func (x *Index) Cut(protocol Protocol, to, endpoint netip.AddrPort, lives Lives) bool {
	f, found := x.Find(protocol, to)
	switch {
	case protocol == TCP:
		return found && lives(f.Service, endpoint).Gone
	case to.Addr().IsLoopback() && to.Port() == endpoint.Port() && x.atNode(endpoint.Addr()):
		return false
	case !found:
		return true
	}
	life := lives(f.Service, endpoint)
	return !life.Present || to.Port() == DNSPort && !life.Serving
}

func (x *Index) hasGone(key Key) bool {
	if len(x.gone) == 0 {
		return false
	}
	_, found := x.gone[key]
	if !found && x.atNode(key.Addr) {
		_, found = x.gone[nodePortKey(key)]
	}
	return found
}

func (x *Index) inRanges(addr netip.Addr) bool {
	if !inet.Contains(x.ranges, addr) {
		return false
	}
	_, other := x.others[addr]
	return !other
}

// atNode reports whether NodePorts answer at the address.
func (x *Index) atNode(addr netip.Addr) bool {
	if addr.IsLoopback() {
		return true
	}
	_, found := x.nodeAddrs[addr]
	return found
}

// nodePortKey returns the key of the NodePort at a key's address.
func nodePortKey(key Key) Key {
	if key.Addr.Is4() {
		key.Addr = netip.IPv4Unspecified()
	} else {
		key.Addr = netip.IPv6Unspecified()
	}
	return key
}

func includes(b Backends, endpoint netip.AddrPort) bool {
	_, found := slices.BinarySearchFunc(b.Endpoints, endpoint, netip.AddrPort.Compare)
	return found
}
