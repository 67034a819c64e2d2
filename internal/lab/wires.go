package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/topology"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/kernel/ruleset"
	"github.com/fathom-network/fathom/internal/lab/networks"
)

// The wires of a lab: every node has a device eth0, whose other end is a port of its cluster's switch, a
// bridge in a namespace of its own. The core, a namespace too, routes between the clusters' subnets, and
// has one wire, the uplink, to the host.
const (
	coreName   = "core"
	bridgeName = "switch"
	nodeDevice = "eth0"
	coreUplink = "uplink"
)

func switchName(c *topology.Cluster) string { return "switch-" + c.Name }

// portName is the switch's end of a node's wire: the node's name without the cluster's, which fits a
// device name (15 bytes).
func portName(c *topology.Cluster, n *topology.Node) string {
	return strings.TrimPrefix(n.Name, c.Name+"-")
}

// uplinkName is the host's end of the uplink. Long lab names are shortened by a hash.
func (l *Lab) uplinkName() string {
	name := "fa-" + l.Name
	if len(name) > 15 {
		h := fnv.New32a()
		h.Write([]byte(l.Name))
		name = fmt.Sprintf("fa-%.7s%05x", l.Name, h.Sum32()&0xfffff)
	}
	return name
}

func (l *Lab) uplinkAlias() string { return "fathom lab " + l.Name + ": uplink" }

func (l *Lab) hostTable() string { return "fathom-" + l.Name }

// openHost opens the network namespace that this process, and so the user, is in.
func openHost() (*link.Namespace, error) { return link.Open(link.OwnNetNS) }

// setWires makes the core, the uplink and the switches, as far as they are not there.
func (l *Lab) setWires() error {
	for _, name := range append([]string{coreName}, l.switchNames()...) {
		if err := link.Create(l.netnsPath(name)); err != nil {
			return err
		}
	}
	core, err := link.Open(l.netnsPath(coreName))
	if err != nil {
		return err
	}
	defer core.Close()
	if err := router(core); err != nil {
		return err
	}
	for i := range l.Clusters {
		if err := l.setSwitch(core, &l.Clusters[i]); err != nil {
			return fmt.Errorf("switch of cluster %s: %w", l.Clusters[i].Name, err)
		}
	}
	if err := l.setUplink(core); err != nil {
		return fmt.Errorf("uplink: %w", err)
	}
	return nil
}

func (l *Lab) switchNames() []string {
	var names []string
	for i := range l.Clusters {
		names = append(names, switchName(&l.Clusters[i]))
	}
	return names
}

// router lets a namespace forward packets.
func router(n *link.Namespace) error {
	if err := n.SetUp("lo", true); err != nil {
		return err
	}
	if err := n.Sysctl("ipv4/ip_forward", "1"); err != nil {
		return err
	}
	if !ipv6Available() {
		return nil
	}
	return n.Sysctl("ipv6/conf/all/forwarding", "1")
}

func ipv6Available() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func (l *Lab) setSwitch(core *link.Namespace, c *topology.Cluster) error {
	sw, err := link.Open(l.netnsPath(switchName(c)))
	if err != nil {
		return err
	}
	defer sw.Close()
	alias := fmt.Sprintf("fathom lab %s: switch of cluster %s", l.Name, c.Name)
	if err := sw.SetBridge(link.Device{Name: bridgeName, Alias: alias}); err != nil {
		return err
	}
	alias = fmt.Sprintf("fathom lab %s: cluster %s to core", l.Name, c.Name)
	port := corePort(c)
	if err := core.SetPair(link.Device{Name: port, Alias: alias}, sw,
		link.Device{Name: coreName, Alias: alias, Bridge: bridgeName}); err != nil {
		return err
	}
	var addrs []netip.Prefix
	for i, gw := range c.Gateways(&l.Lab) {
		addrs = append(addrs, netip.PrefixFrom(gw, c.Subnets(&l.Lab)[i].Bits()))
	}
	return core.SetAddrs(port, addrs)
}

// corePort is the core's device toward a cluster. Cluster names can be longer than device names.
func corePort(c *topology.Cluster) string { return fmt.Sprintf("cluster%d", c.Index+1) }

func (l *Lab) setUplink(core *link.Namespace) error {
	host, err := openHost()
	if err != nil {
		return err
	}
	defer host.Close()
	name := l.uplinkName()
	if err := host.SetPair(link.Device{Name: name, Alias: l.uplinkAlias()}, core,
		link.Device{Name: coreUplink, Alias: l.uplinkAlias()}); err != nil {
		return err
	}
	hostAddrs, coreAddrs := l.families(l.UplinkHost()), l.families(l.UplinkCore())
	if err := host.SetAddrs(name, hostAddrs); err != nil {
		return err
	}
	for i := range l.Clusters { // the balancers' addresses are on the uplink, where the host reaches them
		if c := &l.Clusters[i]; len(c.ControlPlanes()) > 1 {
			a := l.APIAddr(c)
			coreAddrs = append(coreAddrs, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	if err := core.SetAddrs(coreUplink, coreAddrs); err != nil {
		return err
	}
	var toHost []link.Route
	for _, p := range hostAddrs {
		toHost = append(toHost, link.Route{To: defaultRoute(p.Addr()), Via: p.Addr()})
	}
	if err := core.SetRoutes(toHost); err != nil {
		return err
	}
	if err := host.SetDeviceRoutes(name, l.underlayRoutes(coreAddrs)); err != nil {
		return err
	}
	underlay := l.families([]netip.Prefix{l.Underlay4, l.Underlay6})
	// Nodes keep their address toward the host, which has a route back; whatever else leaves is a pod's.
	if err := setUplink(core, ruleset.Uplink{Table: "fathom", From: underlay, Inside: coreUplink, Outside: true,
		Comment: "fathom lab " + l.Name + ": pods leave with the address of the uplink"}); err != nil {
		return err
	}
	return setUplink(host, ruleset.Uplink{Table: l.hostTable(), From: underlay, Inside: name,
		Guard:   l.HostAccess == topology.HostAccessNone,
		Comment: "fathom lab " + l.Name + ": nodes leave this machine with its address"})
}

// setUplink has packets that leave a namespace take its address.
func setUplink(n *link.Namespace, u ruleset.Uplink) error {
	rules, err := ruleset.Open(n.Path())
	if err != nil {
		return err
	}
	defer rules.Close()
	_, err = rules.SetUplink(u)
	return err
}

func deleteTable(n *link.Namespace, name string) error {
	rules, err := ruleset.Open(n.Path())
	if err != nil {
		return err
	}
	defer rules.Close()
	return rules.Delete(name)
}

// families keeps the prefixes of families that the lab uses: a host without IPv6 is not asked for it by a
// lab without.
func (l *Lab) families(all []netip.Prefix) []netip.Prefix {
	uses := map[bool]bool{}
	for _, c := range l.Clusters {
		for _, f := range c.Families {
			uses[f == topology.IPv4] = true
		}
	}
	var keep []netip.Prefix
	for _, p := range all {
		if p.IsValid() && uses[p.Addr().Is4()] {
			keep = append(keep, p)
		}
	}
	return keep
}

func (l *Lab) underlayRoutes(core []netip.Prefix) []link.Route {
	var routes []link.Route
	for _, p := range l.families([]netip.Prefix{l.Underlay4, l.Underlay6}) {
		for _, via := range core {
			if via.Addr().Is4() == p.Addr().Is4() {
				routes = append(routes, link.Route{To: p, Via: via.Addr()})
				break
			}
		}
	}
	return routes
}

func defaultRoute(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

// plug connects a node to its switch and sets its addresses and routes.
func (l *Lab) plug(c *topology.Cluster, n *topology.Node, m *machine.Machine) error {
	sw, err := link.Open(l.netnsPath(switchName(c)))
	if err != nil {
		return err
	}
	defer sw.Close()
	node, err := link.Open(m.NetNS())
	if err != nil {
		return err
	}
	defer node.Close()
	addrs := l.NodeAddrs(c, n)
	alias := fmt.Sprintf("fathom lab %s: node %s", l.Name, n.Name)
	if err := sw.SetPair(
		link.Device{Name: portName(c, n), Alias: alias, Bridge: bridgeName}, node,
		link.Device{Name: nodeDevice, Alias: alias, MAC: macOf(c, n)}); err != nil {
		return err
	}
	var prefixes []netip.Prefix
	for i, a := range addrs {
		prefixes = append(prefixes, netip.PrefixFrom(a, c.Subnets(&l.Lab)[i].Bits()))
	}
	if err := node.SetAddrs(nodeDevice, prefixes); err != nil {
		return err
	}
	var routes []link.Route
	for _, gw := range c.Gateways(&l.Lab) {
		routes = append(routes, link.Route{To: defaultRoute(gw), Via: gw})
	}
	network := networks.Of(c.Network.Kind).Wire(l.networkOf(c), n)
	routes = append(routes, network.Routes...)
	if network.Uplink != nil {
		if err := setUplink(node, *network.Uplink); err != nil {
			return err
		}
	}
	if err := router(node); err != nil {
		return err
	}
	if err := node.SetRoutes(routes); err != nil {
		return err
	}
	shape, err := shapeOf(n.Wire)
	if err != nil {
		return err
	}
	if shape == (link.Shape{}) {
		return nil
	}
	return l.shape(c, n, m, shape)
}

// macOf makes a node's hardware address from its place in the lab, so that a node that comes back has the
// one that its neighbours know.
func macOf(c *topology.Cluster, n *topology.Node) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0xfa, 0, byte(c.Index + 1), 0, 0}
	binary.BigEndian.PutUint16(mac[4:], uint16(n.Index+2))
	return mac
}

func shapeOf(w topology.Wire) (link.Shape, error) {
	var s link.Shape
	var err error
	if w.Rate != "" {
		if s.Rate, err = topology.ParseRate(w.Rate); err != nil {
			return s, err
		}
	}
	if w.Delay != "" {
		if s.Delay, err = topology.ParseDelay(w.Delay); err != nil {
			return s, err
		}
	}
	s.Loss = w.Loss
	return s, nil
}

// shape makes both directions of a node's wire alike.
func (l *Lab) shape(c *topology.Cluster, n *topology.Node, m *machine.Machine, s link.Shape) error {
	for _, end := range []struct{ path, device string }{
		{l.netnsPath(switchName(c)), portName(c, n)}, {m.NetNS(), nodeDevice},
	} {
		ns, err := link.Open(end.path)
		if err != nil {
			return err
		}
		err = ns.SetShape(end.device, s)
		ns.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// removeWires takes away the namespaces, the uplink and what it set on the host.
func (l *Lab) removeWires() error {
	var problems []error
	host, err := openHost()
	if err != nil {
		return err
	}
	defer host.Close()
	problems = append(problems, host.DeleteDevice(l.uplinkName(), l.uplinkAlias()), deleteTable(host, l.hostTable()))
	dir := filepath.Dir(l.netnsPath(coreName))
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		problems = append(problems, err)
	}
	for _, e := range entries {
		problems = append(problems, link.Delete(filepath.Join(dir, e.Name())))
	}
	for _, dir := range []string{dir, filepath.Dir(dir), l.Paths.Run} {
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) && dir != l.Paths.Run {
			problems = append(problems, err)
		}
	}
	return errors.Join(problems...)
}

// Wire is the state of a node's link.
type Wire struct {
	Node      string `json:"node"`
	Cluster   string `json:"cluster"`
	Port      string `json:"port"`
	Addresses string `json:"addresses"`
	State     string `json:"state"` // up, cut or off (the node is not running)
	Rate      string `json:"rate,omitempty"`
	Delay     string `json:"delay,omitempty"`
	Loss      string `json:"loss,omitempty"`
}

// Wires returns the state of every node's link.
func (l *Lab) Wires() ([]Wire, error) {
	var all []Wire
	for i := range l.Clusters {
		c := &l.Clusters[i]
		sw, err := link.Open(l.netnsPath(switchName(c)))
		if err != nil {
			return nil, fmt.Errorf("lab %s has no wires, bring it up with `fathom up --name %s`: %w", l.Name, l.Name, err)
		}
		for j := range c.Nodes {
			n := &c.Nodes[j]
			w := Wire{Node: n.Name, Cluster: c.Name, Port: portName(c, n), State: "off"}
			var addrs []string
			for _, a := range l.NodeAddrs(c, n) {
				addrs = append(addrs, a.String())
			}
			w.Addresses = strings.Join(addrs, ",")
			// The device of a node that has just ended stays until the kernel has cleared its namespace.
			_, off := l.Machine(n.Name)
			if d, err := sw.Device(w.Port); err == nil && off == nil {
				if w.State = "cut"; d.Up {
					w.State = "up"
				}
				s, err := sw.Shape(w.Port)
				if err != nil {
					sw.Close()
					return nil, err
				}
				w.Rate, w.Delay, w.Loss = s.Strings()
			}
			all = append(all, w)
		}
		sw.Close()
	}
	return all, nil
}

// CutWire takes the link of a node down, as if the cable were pulled; HealWire plugs it in again.
func (l *Lab) CutWire(node string) error { return l.setWire(node, false) }

// HealWire undoes CutWire and SlowWire.
func (l *Lab) HealWire(node string) error {
	if err := l.setWire(node, true); err != nil {
		return err
	}
	return l.SlowWire(node, topology.Wire{})
}

func (l *Lab) setWire(node string, up bool) error {
	c, n, err := l.Node(node)
	if err != nil {
		return err
	}
	if _, err := l.Machine(node); err != nil {
		return err
	}
	sw, err := link.Open(l.netnsPath(switchName(c)))
	if err != nil {
		return err
	}
	defer sw.Close()
	return sw.SetUp(portName(c, n), up)
}

// SlowWire limits the rate of a node's link, delays and loses packets, in both directions alike. It
// replaces what was set before.
func (l *Lab) SlowWire(node string, w topology.Wire) error {
	c, n, err := l.Node(node)
	if err != nil {
		return err
	}
	m, err := l.Machine(node)
	if err != nil {
		return err
	}
	s, err := shapeOf(w)
	if err != nil {
		return err
	}
	return l.shape(c, n, m, s)
}
