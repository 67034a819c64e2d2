package vip

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/facts/service"
)

// Facts determine which addresses a node answers for.
type Facts struct {
	Node      string // whose view it is
	Pools     Pools
	Balancers []service.LoadBalanced
	Nodes     []Node
	Segments  []podnet.Segment // that its devices are on
}

// Judge returns, for each load balancer's address and external IP, which node answers for it on this node's segments and
// whether routers may send its packets to this node; sorted by address.
func (f Facts) Judge() []Verdict {
	targets := map[netip.Addr][]Target{}
	for _, l := range f.Balancers {
		for _, addr := range slices.Concat(l.Addrs, l.ExternalIPs) {
			// An address in no pool belongs to another controller.
			if f.Pools.Contains(addr) {
				targets[addr] = append(targets[addr], l)
			}
		}
	}
	near := map[string]map[string]bool{} // nodes on the segments of a device
	verdicts := make([]Verdict, 0, len(targets))
	for _, addr := range slices.SortedFunc(maps.Keys(targets), netip.Addr.Compare) {
		v := Verdict{Address: addr, Devices: podnet.On(addr, f.Segments)}
		v.Eligible = Eligible(addr, targets[addr], f.Nodes)
		v.Routed = slices.Contains(v.Eligible, f.Node)
		if len(v.Devices) > 0 {
			device := v.Devices[0]
			if near[device] == nil {
				near[device] = f.near(device)
			}
			here := slices.DeleteFunc(slices.Clone(f.Nodes), func(n Node) bool { return !near[device][n.Name] })
			v.Announcer = Announcer(addr, Eligible(addr, targets[addr], here))
			v.Answers = v.Announcer == f.Node
			v.StandIn = f.standIn(addr, v.Announcer, near[device])
		}
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// standIn returns the node that answers in place of one whose agent is away: any on the segment will do, since it gets none
// of the packets.
func (f Facts) standIn(addr netip.Addr, announcer string, near map[string]bool) string {
	away := false
	var others []string
	for _, n := range f.Nodes {
		switch {
		case n.Name == announcer:
			away = n.Away
		case n.Alive && !n.Away && near[n.Name]:
			others = append(others, n.Name)
		}
	}
	if !away {
		return ""
	}
	return Announcer(addr, others)
}

// near returns the nodes on a segment of a device, including this one. An IPv6 segment is also that of the nodes' IPv4
// addresses on the same device: a Node may have addresses of only one family.
func (f Facts) near(device string) map[string]bool {
	on := map[string]bool{f.Node: true}
	for _, n := range f.Nodes {
		for _, s := range f.Segments {
			if s.Device == device && slices.ContainsFunc(n.Addrs, s.Prefix.Contains) {
				on[n.Name] = true
			}
		}
	}
	return on
}

// Answered returns the addresses that the node answers for on its segments.
func Answered(verdicts []Verdict) []netip.Addr {
	addrs := []netip.Addr{}
	for _, v := range verdicts {
		if v.Answers {
			addrs = append(addrs, v.Address)
		}
	}
	return addrs
}

// Verdict is a node's decision about an address.
type Verdict struct {
	Address netip.Addr `json:"address"`
	// Devices are those of its devices on whose segments the address is.
	Devices []string `json:"devices,omitempty"`
	// Eligible are all nodes that may take packets for the address.
	Eligible []string `json:"eligible,omitempty"`
	// Announcer is the node that answers for the address on these segments; empty if none does.
	Announcer string `json:"announcer,omitempty"`
	// Answers reports whether that is this node.
	Answers bool `json:"answers,omitempty"`
	// StandIn is the node that answers, while the announcer's agent is away, that packets go to the announcer.
	StandIn string `json:"standIn,omitempty"`
	// Routed reports whether the address is announced to routers that get such addresses.
	Routed bool `json:"routed,omitempty"`
}
