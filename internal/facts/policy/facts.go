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
	// Peer is the identity of the address. It is Unnumbered where there are more identities than numbers.
	Peer Number
	// Of says what the identity is, "shop app=web http:8080/6 in:10.0.0.0/8": the namespace, labels, named ports, and networks.
	Of string
	// Own says that it is a pod of the node, which Pod names. Isolated are its classes of NetworkPolicies, by direction; 0 is not isolated.
	// Tiers are those of policies of Admin and Baseline, which are asked before; 0 is no such policy.
	Own      bool
	Pod      service.Name
	Isolated [2]Number
	Tiers    [2]Number
	// Audited says that no policy of the class in Isolated isolates by itself: what the class does not allow is told, and allowed.
	Audited [2]bool
}

// Free says that no policy has anything to say of what the pod of the address sends or hears.
func (a Address) Free() bool { return a.Isolated == [2]Number{} && a.Tiers == [2]Number{} }

// Class is what the pods of a node that the same policies isolate in a direction may do there. Its pointer changes with it.
//
// That of Tiers is of policies of Admin and Baseline. It has answers of all actions, and nothing where no rule is for a peer. A pod's address
// is looked up in Allows alone and any other in Blocks alone; what is said of a port comes before what is said of everything.
type Class struct {
	Number
	Direction
	Tiers    bool
	Policies []ID // in order
	// Allows is sorted, and no two are about the same peer, protocol and port.
	Allows []Allow
	// Blocks is sorted, and no two are about the same address, protocol and port.
	Blocks []AllowBlock
}

// equal says that two classes are the same.
func (c *Class) equal(o *Class) bool {
	return c.Number == o.Number && c.Direction == o.Direction && c.Tiers == o.Tiers && same(c.Policies, o.Policies) && same(c.Allows, o.Allows) && same(c.Blocks, o.Blocks)
}

// same says that two lists hold the same, at a glance where they are one.
func same[E comparable](a, b []E) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

// Apart returns what each of two states of a class of NetworkPolicies holds that the other one does not: little, of what may be much. Blocks are left whole
// where they differ.
func Apart(a, b *Class) (onlyA, onlyB *Class) {
	x, y := *a, *b
	x.Allows, y.Allows = nil, nil
	i, j := 0, 0
	for i < len(a.Allows) || j < len(b.Allows) {
		var order int
		switch {
		case i == len(a.Allows):
			order = 1
		case j == len(b.Allows):
			order = -1
		default:
			order = cmp.Or(cmp.Compare(a.Allows[i].Peer, b.Allows[j].Peer), a.Allows[i].compare(b.Allows[j].Grant))
		}
		if order == 0 && a.Allows[i] == b.Allows[j] {
			i, j = i+1, j+1
			continue
		}
		if order <= 0 {
			x.Allows = append(x.Allows, a.Allows[i])
			i++
		}
		if order >= 0 {
			y.Allows = append(y.Allows, b.Allows[j])
			j++
		}
	}
	if same(a.Blocks, b.Blocks) {
		x.Blocks, y.Blocks = nil, nil
	}
	return &x, &y
}

// Grant is what is allowed with a peer, and by what. All is any port of any protocol, also of one without ports. In a class of Tiers it may
// be denied or passed as well.
type Grant struct {
	Action   Action
	All      bool
	Protocol service.Protocol
	From, To uint16
	By       Reason
}

// Reason names the rule that decides about something.
type Reason struct {
	ID
	// Position is where it stands in the object, "spec.ingress[0].from[1]", or the rule alone where any peer will do.
	Position string
	Rule     string // its name, if it has one
}

// String returns "default/web spec.ingress[0].from[1]", and of a rule that has a name "web spec.ingress[0].from[1] (monitoring)".
func (r Reason) String() string {
	s := r.path() + " " + r.Position
	if r.Rule != "" {
		s += " (" + r.Rule + ")"
	}
	return s
}

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
	// Isolated says that policies decide, which are Policies. By is the rule of them that does; if no rule allows it, it is none.
	Isolated bool
	Policies []ID
	By       Reason
	// Passed is the rule of Admin or Baseline that left it to the next tier, if one did.
	Passed Reason
	// Audit are the audited NetworkPolicies that would drop what is allowed, if they were not audited.
	Audit []ID
}

// Judge says what these facts make of a packet in one direction, as the node's kernel does. The pod that may be isolated is the
// packet's destination for Ingress, and its source for Egress; of a pod of another node nothing follows.
func (f Facts) Judge(d Direction, p Packet) Verdict {
	subject, peer := p.To, p.From
	if d == Egress {
		subject, peer = peer, subject
	}
	a := f.Addrs[subject]
	if subject == peer { // a pod cannot be kept from itself
		return Verdict{Allowed: true}
	}
	v := f.judgeTiers(d, subject, peer, p)
	if v.Isolated || a.Isolated[d] == 0 {
		return v
	}
	c := f.Classes[a.Isolated[d]]
	if a.Audited[d] {
		if _, would := c.find(f.Addrs[peer].Peer, peer, p); !would {
			v.Audit = c.Policies
		}
		return v
	}
	v.Isolated, v.Policies = true, c.Policies
	v.By, v.Allowed = c.find(f.Addrs[peer].Peer, peer, p)
	return v
}

// JudgeToNode says what these facts make of a packet that a pod sends to its own node: NetworkPolicies are not asked.
func (f Facts) JudgeToNode(p Packet) Verdict { return f.judgeTiers(Egress, p.From, p.To, p) }

// judgeTiers says what policies of Admin and Baseline make of a packet: they do not decide, and allow it, where no rule is for it or one passes it.
func (f Facts) judgeTiers(d Direction, subject, peer netip.Addr, p Packet) Verdict {
	n, identity := f.Addrs[subject].Tiers[d], f.Addrs[peer].Peer
	if n == 0 {
		return Verdict{Allowed: true}
	}
	c := f.Classes[n]
	g, found := c.answer(identity, peer, p)
	switch {
	case identity == Unnumbered:
		return Verdict{Isolated: true, Policies: c.Policies}
	case found && g.Action != Pass:
		return Verdict{Isolated: true, Policies: c.Policies, By: g.By, Allowed: g.Action == Accept}
	}
	return Verdict{Allowed: true, Passed: g.By}
}

func (c *Class) find(identity Number, peer netip.Addr, p Packet) (Reason, bool) {
	for _, n := range []Number{identity, 0} {
		for _, g := range c.with(n) {
			if g.covers(p) {
				return g.By, true
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

// with returns what there is of an identity.
func (c *Class) with(n Number) (list []Grant) {
	from, _ := slices.BinarySearchFunc(c.Allows, n, func(a Allow, n Number) int { return cmp.Compare(a.Peer, n) })
	for _, a := range c.Allows[from:] {
		if a.Peer != n {
			break
		}
		list = append(list, a.Grant)
	}
	return list
}

// answer is what a class of Tiers says of a packet.
func (c *Class) answer(identity Number, peer netip.Addr, p Packet) (g Grant, found bool) {
	for _, x := range c.answers(identity, peer) {
		if x.covers(p) && (!found || !x.All) {
			g, found = x, true
		}
	}
	return g, found
}

// answers are those of a class of Tiers for a peer.
func (c *Class) answers(identity Number, peer netip.Addr) (list []Grant) {
	if identity != 0 {
		return c.with(identity)
	}
	for _, b := range c.Blocks {
		if peer.Compare(b.First) >= 0 && peer.Compare(b.Last) <= 0 {
			list = append(list, b.Grant)
		}
	}
	return list
}

func (g Grant) covers(p Packet) bool {
	return g.All || g.Protocol == p.Protocol && g.From <= p.Port && p.Port <= g.To
}
