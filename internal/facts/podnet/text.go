package podnet

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// String writes the plan as `ip` and `bridge` would, one thing a line.
func (p Plan) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# node %s, mode %s, MTU of pods %d\n", p.Node, p.Mode, p.PodMTU)
	for _, peer := range p.Peers {
		fmt.Fprintf(&b, "# peer %s: IPv4 %s, IPv6 %s\n", peer.Node, cmp.Or(peer.IPv4, "-"), cmp.Or(peer.IPv6, "-"))
	}
	b.WriteString(p.State.String())
	return b.String()
}

func (s State) String() string {
	var b strings.Builder
	device := DefaultDevice
	if t := s.Tunnel; t != nil {
		device = t.Name
		fmt.Fprintf(&b, "link %s\n", t)
		for _, a := range t.Addrs {
			fmt.Fprintf(&b, "addr %s dev %s\n", netip.PrefixFrom(a, a.BitLen()), t.Name)
		}
	}
	for _, r := range s.Routes {
		fmt.Fprintf(&b, "route %s\n", r)
	}
	for _, n := range s.Neighbours {
		fmt.Fprintf(&b, "neigh %s dev %s\n", n, device)
	}
	for _, f := range s.Forwards {
		fmt.Fprintf(&b, "fdb %s dev %s\n", f, device)
	}
	for _, c := range s.Sysctls {
		fmt.Fprintf(&b, "sysctl %s\n", c)
	}
	b.WriteString(s.Masquerade.String())
	b.WriteString(s.Guard.String())
	return b.String()
}

func (t Tunnel) String() string {
	local := ""
	if t.Local.IsValid() {
		local = " local " + t.Local.String()
	}
	return fmt.Sprintf("%s type vxlan id %d dstport %d%s nolearning address %s mtu %d", t.Name, t.VNI, t.Port, local, t.MAC, t.MTU)
}

func (r Route) String() string {
	var b strings.Builder
	if r.Unreachable {
		b.WriteString("unreachable ")
	}
	b.WriteString(r.To.String())
	if r.Via.IsValid() {
		fmt.Fprintf(&b, " via %s", r.Via)
	}
	if r.Device != "" {
		fmt.Fprintf(&b, " dev %s", r.Device)
	}
	if r.Source.IsValid() {
		fmt.Fprintf(&b, " src %s", r.Source)
	}
	if r.Onlink {
		b.WriteString(" onlink")
	}
	if r.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", r.Metric)
	}
	return b.String()
}

func (n Neighbour) String() string { return fmt.Sprintf("%s lladdr %s nud permanent", n.Addr, n.MAC) }

func (f Forward) String() string { return fmt.Sprintf("%s dst %s self permanent", f.MAC, f.To) }

func (c Sysctl) String() string {
	if c.Instead != "" {
		return fmt.Sprintf("net/%s=%s (if it is %s)", c.Name, c.Value, c.Instead)
	}
	return fmt.Sprintf("net/%s=%s", c.Name, c.Value)
}

func (m Masquerade) String() string {
	var b strings.Builder
	line := func(what string, n int, at func(i int) string) {
		for i := range n {
			fmt.Fprintf(&b, "masquerade %s %s\n", what, at(i))
		}
	}
	line("from", len(m.Sources), func(i int) string { return m.Sources[i].String() })
	line("not to pods", len(m.Pods), func(i int) string { return m.Pods[i].String() })
	line("not to node", len(m.Nodes), func(i int) string { return m.Nodes[i].String() })
	line("not to", len(m.Others), func(i int) string { return m.Others[i].String() })
	return b.String()
}

// sort puts the state into the order in which two of them are compared.
func (s *State) sort() {
	slices.SortFunc(s.Routes, compareRoutes)
	slices.SortFunc(s.Neighbours, func(a, b Neighbour) int {
		return cmp.Or(a.Addr.Compare(b.Addr), slices.Compare(a.MAC[:], b.MAC[:]))
	})
	slices.SortFunc(s.Forwards, func(a, b Forward) int {
		return cmp.Or(slices.Compare(a.MAC[:], b.MAC[:]), a.To.Compare(b.To))
	})
	slices.SortFunc(s.Sysctls, func(a, b Sysctl) int {
		return cmp.Or(cmp.Compare(a.rank(), b.rank()), cmp.Compare(a.Name, b.Name))
	})
}

func compareRoutes(a, b Route) int {
	if c := a.To.Compare(b.To); c != 0 { // as good as always, and there are thousands
		return c
	}
	return cmp.Or(cmp.Compare(a.Metric, b.Metric), a.Via.Compare(b.Via), cmp.Compare(a.Device, b.Device))
}
