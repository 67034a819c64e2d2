package podnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
)

// What vxlan puts around a packet: an outer IP header, UDP (8), vxlan (8) and the inner Ethernet header (14).
var overhead = map[inet.Family]int{inet.IPv4: 20 + 8 + 8 + 14, inet.IPv6: 40 + 8 + 8 + 14}

const (
	// unreachableMetric is worse than that of any route somebody may make to the same range.
	unreachableMetric = 65535
	minMTU, minMTU6   = 576, 1280
	usualMTU          = 1500
)

// NewPlan works out what the kernel of the node named self should hold. underlay are the devices of this machine;
// nodes are all nodes of the cluster, self among them. Where there is a problem the rest of the plan is made all
// the same. A plan without a Node is of a machine that is no node: it is not to be put into a kernel.
func NewPlan(self string, underlay []Interface, nodes []Node, config Config) (Plan, []Problem) {
	p := planner{underlay: underlay, mac: TunnelMAC, told: map[Problem]bool{}}
	plan := p.plan(self, nodes, config)
	return plan, p.problems
}

// planner holds what the steps of making a plan tell each other.
type planner struct {
	config   Config
	underlay []Interface
	mac      func(node string, vni uint32) MAC
	problems []Problem
	told     map[Problem]bool
	usedMTU  []int // of the interfaces that direct routes leave by
}

// member is a node of which only what is valid is left.
type member struct {
	name     string
	addrs    []netip.Addr
	podCIDRs []netip.Prefix // and blocks
	blocks   map[netip.Prefix]bool
	tunnel4  netip.Addr // its addresses on the vxlan device
	tunnel6  netip.Addr

	tunnelDown bool
}

func (m *member) tunnel(f inet.Family) netip.Addr {
	if f == inet.IPv4 {
		return m.tunnel4
	}
	return m.tunnel6
}

func (m *member) setTunnel(f inet.Family, a netip.Addr) {
	if f == inet.IPv4 {
		m.tunnel4 = a
	} else {
		m.tunnel6 = a
	}
}

func (p *planner) add(node string, why Reason, format string, args ...any) {
	problem := Problem{node, why, fmt.Sprintf(format, args...)}
	if !p.told[problem] {
		p.told[problem] = true
		p.problems = append(p.problems, problem)
	}
}

func (p *planner) plan(self string, nodes []Node, config Config) Plan {
	p.config = p.checked(config)
	members := p.members(nodes)
	me := p.self(self, members)
	if me == nil {
		p.add(self, UnknownSelf, "there is no Node of this name, nor one with an address of this machine")
		return Plan{Mode: p.config.Mode}
	}
	p.avoidUnderlay(me, members)
	plan := Plan{Node: me.name, Mode: p.config.Mode, Peers: make([]Peer, 0, len(members))}
	plan.Routes = make([]Route, 0, 2*len(members))
	for _, c := range me.podCIDRs {
		// Without it a packet to an address that no pod has would follow the default route, and come back.
		plan.Routes = append(plan.Routes, Route{To: c, Unreachable: true, Metric: unreachableMetric})
	}
	family := p.underlayFamily(members)
	local := me.addr(family)
	macs := map[MAC]string{p.mac(me.name, p.config.VNI): me.name}
	peers := slices.DeleteFunc(slices.Clone(members), func(m *member) bool { return m == me })
	for _, m := range peers { // the oldest first
		plan.Peers = append(plan.Peers, p.peer(&plan.State, me, m, family, macs))
	}
	slices.SortFunc(plan.Peers, func(a, b Peer) int { return cmp.Compare(a.Node, b.Node) })

	underlayMTU := p.mtuAt(local)
	wrapped := len(plan.Forwards) > 0 || p.config.Mode == VXLAN
	if wrapped || p.config.Standby {
		plan.Tunnel = p.tunnel(me, local, underlayMTU)
	}
	plan.PodMTU = p.podMTU(me, family, underlayMTU, wrapped && plan.Tunnel != nil)
	if plan.Tunnel != nil {
		plan.Tunnel.MTU = underlayMTU - overhead[family]
		if p.config.MTU != 0 {
			plan.Tunnel.MTU = min(p.config.MTU, plan.Tunnel.MTU)
		}
	}
	plan.Sysctls = p.sysctls(plan.State, me)
	plan.Masquerade = p.masquerade(me, members)
	plan.Guard = p.guard(me, members, plan.Tunnel, family)
	if len(plan.Masquerade.Sources) > 0 {
		plan.Sysctls = append(plan.Sysctls, halfClosed)
	}
	plan.sort()
	return plan
}

// checked returns the configuration with its defaults, and with what is wrong replaced by them.
func (p *planner) checked(c Config) Config {
	if _, err := ParseMode(string(c.Mode)); err != nil {
		p.add("", InvalidConfig, "%v", err)
		c.Mode = Auto
	}
	c.Mode = cmp.Or(c.Mode, Auto)
	if c.Underlay != 0 && c.Underlay != inet.IPv4 && c.Underlay != inet.IPv6 {
		p.add("", InvalidConfig, "underlay family %d: want 4 or 6", int(c.Underlay))
		c.Underlay = 0
	}
	c.Device = cmp.Or(c.Device, DefaultDevice)
	if len(c.Device) > 15 || c.Device == "." || c.Device == ".." || strings.ContainsAny(c.Device, "/: \t\n\v\f\r\x00") {
		p.add("", InvalidConfig, "device %q: want a name of at most 15 characters, without space, slash and colon", c.Device)
		c.Device = DefaultDevice
	}
	c.VNI = cmp.Or(c.VNI, DefaultVNI)
	if c.VNI >= 1<<24 {
		p.add("", InvalidConfig, "VNI %d: want 1 to 16777215", c.VNI)
		c.VNI = DefaultVNI
	}
	c.Port = cmp.Or(c.Port, DefaultPort)
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > 65535) {
		p.add("", InvalidConfig, "MTU %d: want %d to 65535, or 0 to have it worked out", c.MTU, minMTU)
		c.MTU = 0
	}
	for _, list := range []*[]netip.Prefix{&c.PodRanges, &c.NonMasquerade, &c.LinkLocal} {
		var good []netip.Prefix
		for _, r := range *list {
			if !r.IsValid() || r.Addr().Is4In6() || r != r.Masked() {
				p.add("", InvalidConfig, "range %s: want a prefix without host bits, such as 10.0.0.0/8", r)
				continue
			}
			good = append(good, r)
		}
		*list = good
	}
	return c
}

// members returns what is valid of the nodes, the oldest first: on every node of the cluster the same.
func (p *planner) members(nodes []Node) []*member {
	byAge := make([]*Node, len(nodes))
	for i := range nodes {
		byAge[i] = &nodes[i]
	}
	slices.SortStableFunc(byAge, func(a, b *Node) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return cmp.Compare(a.Name, b.Name)
	})
	members := make([]*member, 0, len(nodes))
	names := make(map[string]bool, len(nodes))
	owner := make(map[netip.Addr]string, len(nodes))
	for _, n := range byAge {
		if n.Name == "" || names[n.Name] {
			p.add(n.Name, DuplicateName, "there is an older node of this name")
			continue
		}
		names[n.Name] = true
		m := &member{name: n.Name, tunnelDown: n.TunnelDown,
			addrs: make([]netip.Addr, 0, len(n.Addrs)), podCIDRs: make([]netip.Prefix, 0, len(n.PodCIDRs))}
		for _, a := range n.Addrs {
			if why := addrProblem(a); why != "" {
				p.add(n.Name, InvalidAddr, "address %s is of no use: %s", a, why)
				continue
			}
			if slices.Contains(m.addrs, a) {
				continue
			}
			if other, taken := owner[a]; taken {
				p.add(n.Name, DuplicateAddr, "address %s is that of node %s too", a, other)
			} else {
				owner[a] = n.Name
			}
			m.addrs = append(m.addrs, a)
		}
		for _, c := range n.PodCIDRs {
			if why := podCIDRProblem(c); why != "" {
				p.add(n.Name, InvalidPodCIDR, "pod CIDR %s is of no use: %s", c, why)
				continue
			}
			m.podCIDRs = append(m.podCIDRs, c)
		}
		own := len(m.podCIDRs)
		for _, b := range n.Blocks {
			if why := rangeProblem(b); why != "" {
				p.add(n.Name, InvalidPodCIDR, "block %s is of no use: %s", b, why)
				continue
			}
			if m.blocks == nil {
				m.blocks = map[netip.Prefix]bool{}
			}
			m.podCIDRs, m.blocks[b] = append(m.podCIDRs, b), true
		}
		switch {
		case len(m.addrs) == 0:
			p.add(n.Name, NoAddr, "it has no address")
		case own == 0:
			p.add(n.Name, NoPodCIDR, "it has no pod CIDR")
		}
		members = append(members, m)
	}
	p.settle(members, owner)
	return members
}

// self finds this machine's node: by its name, or, where the API knows it by another, by its address.
func (p *planner) self(name string, members []*member) *member {
	var byAddr *member
	for _, m := range members {
		if m.name == name {
			return m
		}
		if byAddr == nil && slices.ContainsFunc(m.addrs, func(a netip.Addr) bool { return p.isOurs(a) }) {
			byAddr = m
		}
	}
	return byAddr
}

// isOurs says whether a device of this machine has the address.
func (p *planner) isOurs(a netip.Addr) bool {
	for _, i := range p.underlay {
		for _, prefix := range i.Addrs {
			if prefix.Addr() == a {
				return true
			}
		}
	}
	return false
}

// addr returns the first address of a family.
func (m *member) addr(f inet.Family) netip.Addr {
	for _, a := range m.addrs {
		if inet.FamilyOf(a) == f {
			return a
		}
	}
	return netip.Addr{}
}

// ranges returns the pod CIDRs of a family.
func (m *member) ranges(f inet.Family) []netip.Prefix {
	var list []netip.Prefix
	for _, c := range m.podCIDRs {
		if inet.FamilyOf(c.Addr()) == f {
			list = append(list, c)
		}
	}
	return list
}

// own returns the first range of a family that is no block: the one that has the node's tunnel address. It is none if
// the node has blocks alone.
func (m *member) own(f inet.Family) netip.Prefix {
	for _, c := range m.ranges(f) {
		if !m.blocks[c] {
			return c
		}
	}
	return netip.Prefix{}
}

// underlayFamily chooses the family of the tunnel's outer packets: on every node of the cluster the same.
func (p *planner) underlayFamily(members []*member) inet.Family {
	if p.config.Underlay != 0 {
		return p.config.Underlay
	}
	for _, m := range members {
		if len(m.addrs) > 0 {
			return inet.FamilyOf(m.addrs[0])
		}
	}
	return inet.IPv4
}

// peer plans the way to the pods of another node.
func (p *planner) peer(s *State, me, m *member, underlay inet.Family, macs map[MAC]string) Peer {
	peer := Peer{Node: m.name}
	for _, a := range m.addrs {
		if p.isOurs(a) || slices.Contains(me.addrs, a) {
			p.add(m.name, DuplicateAddr, "address %s is this node's own (%s): nothing is routed to it", a, me.name)
			return peer
		}
	}
	if len(m.addrs) == 0 {
		return peer // reported already
	}
	wrapped := false
	for _, f := range inet.Families {
		ranges := m.ranges(f)
		if len(ranges) == 0 {
			continue
		}
		way := &peer.IPv4
		if f == inet.IPv6 {
			way = &peer.IPv6
		}
		if via, device, ok := p.onSegment(m, f); ok && (p.config.Mode != VXLAN || m.tunnelDown) {
			for _, to := range ranges {
				s.Routes = append(s.Routes, Route{To: to, Via: via, Device: device.Name})
			}
			p.usedMTU = append(p.usedMTU, device.MTU)
			*way = Direct
			continue
		}
		if p.config.Mode == Direct {
			if a := m.addr(f); a.IsValid() {
				p.add(m.name, NotOnSegment, "address %s is not on a common segment: use mode auto or vxlan, or let the fabric route it (BGP)", a)
			} else {
				p.add(m.name, NoAddr, "it has %s pods but no %s address to route them to: use mode auto or vxlan", f, f)
			}
			continue
		}
		if !me.tunnel(f).IsValid() {
			continue // no pods of this family here: nothing to send from
		}
		if !me.addr(underlay).IsValid() {
			p.add(me.name, NoUnderlay, "it has no %s address for the tunnel", underlay)
			continue
		}
		if !m.addr(underlay).IsValid() {
			p.add(m.name, NoUnderlay, "it has no %s address for the tunnel", underlay)
			continue
		}
		mac := p.mac(m.name, p.config.VNI)
		if other, taken := macs[mac]; taken && other != m.name {
			p.add(m.name, MACClash, "its tunnel's MAC address %s is that of node %s too: rename one of them", mac, other)
			continue
		}
		macs[mac] = m.name
		via := m.tunnel(f)
		if f == inet.IPv6 {
			// Not the tunnel address: IPv6 looks a gateway up even if it is said to be on the link, and refuses it
			// where a route leads elsewhere, as the one that is to be replaced may.
			via = linkLocal(mac)
		}
		for _, to := range ranges {
			s.Routes = append(s.Routes, Route{
				To: to, Via: via, Device: p.config.Device, Source: me.tunnel(f), Onlink: f == inet.IPv4,
			})
		}
		s.Neighbours = append(s.Neighbours, Neighbour{via, mac})
		if !wrapped {
			s.Forwards = append(s.Forwards, Forward{mac, m.addr(underlay)})
		}
		wrapped = true
		*way = VXLAN
	}
	return peer
}

// onSegment returns the first address of the family that is on a segment of this machine's, and by which device.
func (p *planner) onSegment(m *member, f inet.Family) (netip.Addr, Interface, bool) {
	for _, a := range m.addrs {
		if i := p.deviceTo(a); inet.FamilyOf(a) == f && i >= 0 {
			return a, p.underlay[i], true
		}
	}
	return netip.Addr{}, Interface{}, false
}

func (p *planner) isOnSegment(a netip.Addr) bool { return p.deviceTo(a) >= 0 }

// deviceTo returns the index of the device on whose segment the address is: that of the longest prefix, as the
// kernel would choose. It is -1 for an address behind a router.
func (p *planner) deviceTo(a netip.Addr) int {
	best, bits := -1, -1
	for i, device := range p.underlay {
		for _, prefix := range device.Addrs {
			if prefix.IsSingleIP() || !prefix.Contains(a) {
				continue
			}
			if prefix.Bits() > bits || prefix.Bits() == bits && device.Name < p.underlay[best].Name {
				best, bits = i, prefix.Bits()
			}
		}
	}
	return best
}

func (p *planner) tunnel(me *member, local netip.Addr, underlayMTU int) *Tunnel {
	if !local.IsValid() {
		return nil // reported already, where there is a peer to use it
	}
	t := &Tunnel{
		Name: p.config.Device, VNI: p.config.VNI, Port: p.config.Port, MAC: p.mac(me.name, p.config.VNI),
		MTU: underlayMTU, Local: local,
	}
	if !p.isOurs(local) {
		p.add(me.name, InvalidAddr, "address %s is on no device of this machine", local)
		if local.Is4() {
			t.Local = netip.Addr{} // a device with an IPv6 underlay is known by its local address
		}
	}
	for _, f := range inet.Families {
		if a := me.tunnel(f); a.IsValid() {
			t.Addrs = append(t.Addrs, a)
		}
	}
	return t
}

// mtuAt returns the MTU of the device that has the address on a segment. An address that is on none, such as one
// of /32 that a routing daemon announces, may leave by any of them: the smallest counts.
func (p *planner) mtuAt(a netip.Addr) int {
	smallest := 0
	for _, i := range p.underlay {
		for _, prefix := range i.Addrs {
			if prefix.Addr() == a && !prefix.IsSingleIP() {
				return i.MTU
			}
		}
		if smallest == 0 || i.MTU < smallest {
			smallest = i.MTU
		}
	}
	if smallest == 0 || smallest > 65535 {
		return usualMTU
	}
	return smallest
}

func (p *planner) podMTU(me *member, underlay inet.Family, underlayMTU int, wrapped bool) int {
	mtu := underlayMTU
	if wrapped {
		mtu -= overhead[underlay]
	}
	for _, used := range p.usedMTU {
		mtu = min(mtu, used)
	}
	if p.config.MTU > mtu {
		// Larger packets would be lost: a pod would connect, and then hang.
		p.add(me.name, BadMTU, "MTU %d is configured, but only %d fits the network, which is what pods get", p.config.MTU, mtu)
	} else if p.config.MTU != 0 {
		mtu = p.config.MTU
	}
	if mtu < minMTU6 && len(me.ranges(inet.IPv6)) > 0 {
		p.add(me.name, BadMTU, "with an MTU of %d there is no IPv6, which needs %d", mtu, minMTU6)
	}
	return mtu
}

// masquerade plans which packets of pods leave with the node's address.
func (p *planner) masquerade(me *member, members []*member) Masquerade {
	var m Masquerade
	for _, f := range inet.Families {
		if f == inet.IPv4 && !p.config.NoMasquerade4 || f == inet.IPv6 && !p.config.NoMasquerade6 {
			m.Sources = append(m.Sources, me.ranges(f)...)
		}
	}
	m.Pods = append(m.Pods, p.config.PodRanges...)
	for _, other := range members {
		m.Pods = append(m.Pods, other.podCIDRs...)
		for _, a := range other.addrs {
			// What goes to a node behind a router leaves with this node's address, unless the fabric routes pods'
			// addresses, as it must in mode direct: fabrics, clouds' above all, drop sources that they do not know,
			// and the API server is such a node. A fabric that lets them pass is listed in NonMasquerade.
			if other == me || p.config.Mode == Direct || p.config.Mode == Auto && p.isOnSegment(a) {
				m.Nodes = append(m.Nodes, a)
			}
		}
	}
	// Link-local and multicast packets are never routed; should one get here, it is nothing to rewrite. What is open of
	// link-local addresses is: a cloud answers its instance there, and knows of no pods.
	m.Others = append(without(unroutable, p.config.LinkLocal), p.config.NonMasquerade...)
	m.Sources, m.Pods, m.Others = inet.Disjoint(m.Sources), inet.Disjoint(m.Pods), inet.Disjoint(m.Others)
	slices.SortFunc(m.Nodes, netip.Addr.Compare)
	m.Nodes = slices.Compact(m.Nodes)
	return m
}

var unroutable = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// halfClosed is kube-proxy's setting (kubernetes/kubernetes#32551), needed where the rules are that have the kernel
// follow connections. What an administrator has chosen stays.
var halfClosed = Sysctl{Name: "netfilter/nf_conntrack_tcp_timeout_close_wait", Value: "3600", Instead: "60",
	Why: "a connection that one side has closed may send for longer than the kernel's minute, with its address rewritten"}

// sysctls lists the settings without which the kernel would not forward as planned.
func (p *planner) sysctls(s State, me *member) []Sysctl {
	var list []Sysctl
	has4, has6 := len(me.ranges(inet.IPv4)) > 0, len(me.ranges(inet.IPv6)) > 0
	segments := map[string]bool{} // devices that are on one
	peers := map[string]bool{}    // of those, the ones that other nodes may be behind
	for _, i := range p.underlay {
		for _, prefix := range i.Addrs {
			segments[i.Name] = segments[i.Name] || !prefix.IsSingleIP()
			peers[i.Name] = peers[i.Name] || slices.Contains(me.addrs, prefix.Addr())
		}
	}
	for _, r := range s.Routes {
		peers[r.Device] = true
	}
	if has4 {
		list = append(list, Sysctl{Name: "ipv4/ip_forward", Value: "1", Why: "pods' packets pass through the node"})
	}
	if has6 {
		for d, ok := range segments {
			if ok {
				list = append(list, Sysctl{Name: "ipv6/conf/" + d + "/accept_ra", Value: "2", Instead: "1",
					Why: "with forwarding on, 1 would make the node forget the default route that it got from a router"})
			}
		}
		list = append(list, Sysctl{Name: "ipv6/conf/all/forwarding", Value: "1", Why: "pods' packets pass through the node"})
	}
	// The kernel takes the greater of the device's and that of "all": 2, loose, wins over 1, strict, and drops next
	// to nothing more than 0 does.
	const loose = "packets may come by another device than answers leave by, while nodes change from vxlan to direct routes or back"
	if has4 {
		for d, ok := range segments {
			if ok && peers[d] {
				list = append(list, Sysctl{Name: "ipv4/conf/" + d + "/rp_filter", Value: "2", Why: loose})
			}
		}
	}
	if t := s.Tunnel; t != nil {
		if has4 {
			list = append(list, Sysctl{Name: "ipv4/conf/" + t.Name + "/rp_filter", Value: "2", Why: loose})
		}
		if has6 {
			list = append(list,
				Sysctl{Name: "ipv6/conf/" + t.Name + "/accept_ra", Value: "0", Why: "there are no routers on the tunnel"},
				Sysctl{Name: "ipv6/conf/" + t.Name + "/addr_gen_mode", Value: "1", Why: "nodes know each other's addresses: no link-local one, and nothing to announce"})
		}
	}
	return list
}
