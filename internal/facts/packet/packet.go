// Package packet has the words in which the parts of the network say what they do to a packet, and follows a packet from
// part to part. A part says it of what the kernel holds for it; it reads nothing and sends nothing.
//
// The pattern is Antrea's: each feature says how a traced packet is seen in it, so that a trace needs no knowledge of any.
package packet

import (
	"fmt"
	"net/netip"
)

// Origin is where a packet comes from, as the node sees it that decides about it.
type Origin uint8

// The origins. The zero value is what a node trusts least.
const (
	Elsewhere Origin = iota // another machine
	Pod                     // a pod of the node
	Node                    // a process in the node's own network namespace
)

func (o Origin) String() string {
	return [...]string{"elsewhere", "pod", "node"}[o]
}

// Sender is what sends a packet. Programs at connect() see sockets, and rules see packets.
type Sender uint8

// The senders.
const (
	// Unseen is what no program at connect() is run for: another machine, a raw socket, one of the kernel's own, one that
	// is older than the program.
	Unseen      Sender = iota
	Connected          // a socket that connects before it sends; all of TCP do
	Unconnected        // a socket that names an address each time it sends
)

func (s Sender) String() string {
	return [...]string{"unseen", "connected", "unconnected"}[s]
}

// Packet is the first packet of a connection or flow, of which nobody knows anything yet.
type Packet struct {
	Origin   Origin         `json:"origin"`
	Sender   Sender         `json:"sender"`
	Protocol uint8          `json:"protocol"` // an IP protocol number
	Src      netip.AddrPort `json:"src"`
	Dst      netip.AddrPort `json:"dst"`
	// Translated says that rules have given the packet another destination. Connection tracking knows it then, and what
	// comes later sees where it was going at first.
	Translated bool `json:"translated,omitempty"`
}

// Verdict is what becomes of a packet. The zero value is Drop: a part that forgets to say lets nothing through.
type Verdict uint8

// The verdicts.
const (
	Drop      Verdict = iota // nobody is told
	Reject                   // the sender is told
	Pass                     // it goes on as it is
	Translate                // it goes on with another source or destination
	Redirect                 // it leaves by a device at once, and nothing else on the node sees it
)

func (v Verdict) String() string {
	return [...]string{"drop", "reject", "pass", "translate", "redirect"}[v]
}

// MarshalText writes the verdict's name.
func (v Verdict) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// MarshalText writes the origin's name.
func (o Origin) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// MarshalText writes the sender's name.
func (s Sender) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Hop is a decision about a packet.
type Hop struct {
	Part    string  `json:"part"` // who decides: "Services", "fast path", "masquerade"
	Hook    string  `json:"hook"` // where in the kernel: "connect()", "prerouting", "tcx ingress"
	Verdict Verdict `json:"verdict"`
	Why     string  `json:"why"`              // the reason, as a clause: "it has no endpoints"
	Object  string  `json:"object,omitempty"` // the API object that has it so: "Service default/web"
	Rule    string  `json:"rule,omitempty"`   // what in the kernel has it so, as one looks it up there
	Device  string  `json:"device,omitempty"` // of Redirect: by which it leaves
	// Out is what the packet may be from here on: of Translate one of these, each as likely as the others; of Pass the
	// packet. Other verdicts end it on this node.
	Out []Packet `json:"-"`
}

// Ends says whether nothing else on the node sees the packet.
func (h Hop) Ends() bool { return len(h.Out) == 0 }

// Part is a part of the network that decides about packets.
type Part interface {
	// Explain returns what the part does to a packet, in order; nothing if it has nothing to do with it.
	Explain(p Packet) []Hop
}

// Path is one way that a packet may go.
type Path struct {
	Hops []Hop `json:"hops"`
	// End is the packet as it leaves the last part.
	End Packet `json:"end"`
}

// Verdict is that of the last hop that ended the packet, or Pass.
func (p Path) Verdict() Verdict {
	if n := len(p.Hops); n > 0 && p.Hops[n-1].Ends() {
		return p.Hops[n-1].Verdict
	}
	return Pass
}

// Follow returns the ways that a packet may go through parts, in the order in which the kernel comes to them. There is one
// for each choice; at least one.
func Follow(p Packet, parts ...Part) []Path {
	if len(parts) == 0 {
		return []Path{{End: p}}
	}
	return follow(p, parts[0].Explain(p), parts[1:])
}

func follow(p Packet, hops []Hop, rest []Part) []Path {
	if len(hops) == 0 {
		return Follow(p, rest...)
	}
	first := hops[0]
	if first.Ends() {
		return []Path{{Hops: []Hop{first}, End: p}}
	}
	var all []Path
	for _, out := range first.Out {
		for _, path := range follow(out, hops[1:], rest) {
			path.Hops = append([]Hop{first}, path.Hops...)
			all = append(all, path)
		}
	}
	return all
}

// Passed returns a hop that leaves a packet as it is.
func Passed(p Packet, part, hook, why string) Hop {
	return Hop{Part: part, Hook: hook, Verdict: Pass, Why: why, Out: []Packet{p}}
}

// String writes where from and where to: "10.244.1.2:0 > 10.96.0.10:53".
func (p Packet) String() string { return fmt.Sprintf("%s > %s", p.Src, p.Dst) }
