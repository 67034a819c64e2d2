package policy

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/service"
)

// Number stands for an identity or for a class on one node, as long as it is there. 0 stands for none.
//
// It has 16 bits, because the kernel's rules look both up as one number of 32.
type Number uint16

// Facts are what a node's kernel has to know to judge the connections of its pods.
type Facts struct {
	Addrs   map[netip.Addr]Address // of all pods of the cluster
	Classes map[Number]*Class
}

// Address is what is known of a pod's address.
type Address struct {
	// Peer is the identity of the pod. It is 0 where there are more identities than numbers: then the pod is no peer that a
	// selector finds.
	Peer Number
	// Of says what the identity is, "shop app=web http:8080/6": the namespace, labels, and named ports.
	Of string
	// Own says that it is a pod of the node, which Pod names. Isolated are its classes, by direction; 0 is not isolated.
	Own      bool
	Pod      service.Name
	Isolated [2]Number
}

// Class is what the pods of a node that the same policies isolate in a direction may do there. Its pointer changes with it.
type Class struct {
	Number
	Direction
	Policies []ID // that isolate, in order
	// Allows is sorted, and no two are about the same peer, protocol and port.
	Allows []Allow
	// Blocks is sorted, and no two are about the same address, protocol and port.
	Blocks []AllowBlock
}

// Grant is what is allowed with a peer, and by what. All is any port of any protocol, also of one without ports.
type Grant struct {
	All      bool
	Protocol service.Protocol
	From, To uint16
	By       Reason
}

// Reason names the rule that allows something.
type Reason struct {
	ID
	// Position is where it stands in the object, "spec.ingress[0].from[1]", or the rule alone where any peer will do.
	Position string
}

// String returns "default/web spec.ingress[0].from[1]".
func (r Reason) String() string { return r.Name.String() + " " + r.Position }

// Allow allows something with an identity. Peer 0 is everyone.
type Allow struct {
	Peer Number
	Grant
}

// AllowBlock allows something with addresses, the first of which is First and the last Last.
type AllowBlock struct {
	First, Last netip.Addr
	Grant
}

func (g Grant) compare(o Grant) int {
	if g.All != o.All {
		if g.All {
			return -1
		}
		return 1
	}
	return cmp.Or(cmp.Compare(g.Protocol, o.Protocol), cmp.Compare(g.From, o.From), cmp.Compare(g.To, o.To))
}

// Packet is the first packet of a connection as a node forwards it: after it was decided which endpoint of a Service gets it.
type Packet struct {
	From, To netip.Addr
	Protocol service.Protocol
	Port     uint16 // of the destination
}

// Verdict is what becomes of a packet in a direction. The zero value is a drop.
type Verdict struct {
	Allowed bool
	// Isolated says that policies decide, which are Policies. Of those By is the one that allows it, if it is allowed.
	Isolated bool
	Policies []ID
	By       Reason
}

// Judge says what these facts make of a packet in one direction, as the node's kernel does. The pod that may be isolated is the
// packet's destination for Ingress, and its source for Egress; of a pod of another node nothing follows.
func (f Facts) Judge(d Direction, p Packet) Verdict {
	subject, peer := p.To, p.From
	if d == Egress {
		subject, peer = peer, subject
	}
	a := f.Addrs[subject]
	if a.Isolated[d] == 0 || subject == peer { // a pod cannot be kept from itself
		return Verdict{Allowed: true}
	}
	c := f.Classes[a.Isolated[d]]
	v := Verdict{Isolated: true, Policies: c.Policies}
	v.By, v.Allowed = c.find(f.Addrs[peer].Peer, peer, p)
	return v
}

func (c *Class) find(identity Number, peer netip.Addr, p Packet) (Reason, bool) {
	for _, n := range []Number{identity, 0} {
		from, _ := slices.BinarySearchFunc(c.Allows, n, func(a Allow, n Number) int { return cmp.Compare(a.Peer, n) })
		for _, a := range c.Allows[from:] {
			if a.Peer != n {
				break
			}
			if a.covers(p) {
				return a.By, true
			}
		}
	}
	for _, b := range c.Blocks {
		if peer.Compare(b.First) >= 0 && peer.Compare(b.Last) <= 0 && b.covers(p) {
			return b.By, true
		}
	}
	return Reason{}, false
}

func (g Grant) covers(p Packet) bool {
	return g.All || g.Protocol == p.Protocol && g.From <= p.Port && p.Port <= g.To
}
