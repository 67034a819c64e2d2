package service

import (
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// Index finds frontends by destination, and decides which flows that the kernel remembers are stale: those that lead to a
// former endpoint, or past the Service that they were meant for. It is for one goroutine at a time.
type Index struct {
	frontends map[Key]Frontend
	nodeAddrs map[netip.Addr]struct{}
	ranges    []netip.Prefix
	others    map[netip.Addr]struct{}
	// gone holds removed frontends, with the number of sweeps that they are still remembered for.
	gone map[Key]int
}

// sweepsGone is how many sweeps a removed frontend is remembered for. One would do, except for a packet that is on its way
// through the kernel during the sweep.
const sweepsGone = 2

// NewIndex makes an index of a plan's frontends. ranges are where the cluster's Services have their addresses (the
// ServiceCIDRs): what was translated there and is no frontend now was one once, perhaps before this program started.
// others are addresses in them that are somebody else's to serve, such as those of Services with the label
// service.kubernetes.io/service-proxy-name.
//
// The plan has to be whole: flows to Services that are not heard of yet would be taken for stale.
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

// Apply changes the index as the frontends of a Service have changed. Afterwards it is as NewIndex would make it of the
// new plan, and knows besides which frontends have gone.
func (x *Index) Apply(c Change) {
	for _, f := range c.Old {
		// The key may be another Service's by now.
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

// Replace changes the index to that of another plan, as Apply does for one Service.
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

// Swept says that all flows were checked, none of which can have been created by a frontend that was removed before. After
// two such sweeps a removed frontend is forgotten: its address and port may then belong to something else, such as a host
// port.
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

// Serves reports whether there is a frontend for packets to an address and port, or was until recently: their flows are the
// Services' to judge.
func (x *Index) Serves(protocol Protocol, to netip.AddrPort) bool {
	_, found := x.Find(protocol, to)
	return found || x.hasGone(Key{to.Addr(), protocol, to.Port()})
}

// Stale says whether a flow that connection tracking remembers is to be forgotten, so that its next packet is taken for
// the first: to is where it was sent, answers who answers it, and translated whether these differ by our or anybody's
// doing (DNAT). It costs the time of looking a key up, or of two lookups if there is no frontend.
//
// Of TCP nothing is: a connection cannot go on with another endpoint, and to be told so it has to reach the old one.
func (x *Index) Stale(protocol Protocol, to, answers netip.AddrPort, translated bool) bool {
	if protocol != UDP && protocol != SCTP {
		return false
	}
	f, found := x.Find(protocol, to)
	switch {
	case found && translated:
		return !includes(f.Inside, answers) && !includes(f.Outside, answers)
	case found:
		// The flow began before there were endpoints, or before this program started, and goes nowhere for as long as its
		// client keeps sending. A node's own address is different: the node itself may answer there.
		return protocol == UDP && f.Kind != NodePort && len(f.Inside.Endpoints)+len(f.Outside.Endpoints) > 0
	case !translated:
		return false
	}
	key := Key{to.Addr(), protocol, to.Port()}
	return x.hasGone(key) || x.inRanges(to.Addr())
}

// Life is what is known of an endpoint of a Service. The zero value is one that left its Service for an unknown reason.
type Life struct {
	Present bool // it is one, in whatever condition
	Serving bool // be it for new clients or only for those that it has
	Gone    bool // it is none any more, and there is no pod
}

// Lives says what is known of an endpoint.
type Lives func(service Name, endpoint netip.AddrPort) Life

// Ended reports whether a flow is to be ended, by what is known of its endpoint. A UDP or SCTP flow is if it is stale and
// its endpoint no longer serves: an endpoint that gets no new flows, since it terminates or others are nearer, keeps its
// flows. A TCP connection is if its endpoint's pod is gone: the client's next packet then goes to another endpoint, which
// resets the unknown connection, and the client need not wait for a timeout. While the pod lives, the connection does,
// whatever happens to the Service: the pod ends it.
func (x *Index) Ended(protocol Protocol, to, answers netip.AddrPort, translated bool, lives Lives) bool {
	if protocol == TCP {
		return translated && x.Cut(protocol, to, answers, lives)
	}
	if !x.Stale(protocol, to, answers, translated) { // nearly none is, and all are asked about
		return false
	}
	f, found := x.Find(protocol, to)
	return !found || !lives(f.Service, answers).Serving
}

// DNSPort is the port of DNS. Connected UDP sockets to a Service's DNS port are translated to an endpoint, others are not
// (connect.c of package connect).
const DNSPort = 53

// Cut says whether a socket that was connected to an endpoint in a frontend's place is to be ended: the same rule, for what
// has no entry in connection tracking. One of UDP goes nowhere else by itself. If it asks for names it is ended when its
// endpoint serves no more, since a resolver takes another socket. All others are of versions that gave endpoints to all, and
// are wanted for longer: they are ended when the endpoint is none of the Service's any more, be it ready or not. What leads
// to the node's own address in place of a loopback one is moved by who balances packets.
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

// nodePortKey is the key of the NodePort at a key's address.
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
