// Package podlink makes pods' devices: a veth pair between the node's namespace and the pod's, with addresses, routes and
// neighbours at both ends. It finds the node's ends again by their marks in the kernel.
package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

const (
	// Group is the device group of the node's ends of pods' veth pairs. The kernel sets it when it creates the device,
	// while an alias can only be set afterwards: so no device is ever without a mark. `ip link show group 252` lists them,
	// and one rule can match all (`iifgroup 252`).
	Group = 252
	// RouteProtocol marks the node's routes to its own pods; `ip route` shows it as "proto 252". It differs from other
	// routes' protocol, so that a sweep of those leaves these alone.
	RouteProtocol = 252
)

// The node's addresses as pods see them, the same in every pod. No device has the first: pods have a permanent neighbour
// entry for it. Each of the node's ends has the second.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// Gateway returns the next hop of a pod with this address.
func Gateway(a netip.Addr) netip.Addr {
	if a.Is4() {
		return gateway4
	}
	return gateway6
}

// Pod describes a pod's device, and the node's end of it.
type Pod struct {
	Device     string // in the pod, such as eth0
	MAC        net.HardwareAddr
	HostDevice string
	HostMAC    net.HardwareAddr
	Alias      string // of the node's end
	MTU        int    // 0 is the kernel's default
	Addrs      []netip.Addr
	// Sources are the node's addresses. The node uses the one of the family as source when it talks to the pod.
	Sources []netip.Addr
}

// Add makes the veth pair between the node's namespace, which is n, and the pod's: with addresses, routes in both
// directions, and permanent neighbours. If it fails half-way, it leaves nothing behind. If a device has one of the names,
// the error is DeviceExistsError; if another existing pod has one of the addresses, AddressTakenError.
func Add(n, in *link.Namespace, p Pod) (err error) {
	if err := setForwarding(n, p.Addrs); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Group, attrs.HardwareAddr, attrs.MTU = p.HostDevice, Group, p.HostMAC, p.MTU
	host := &netlink.Veth{
		LinkAttrs: attrs, PeerName: p.Device, PeerHardwareAddr: p.MAC, PeerNamespace: netlink.NsFd(in.Fd()),
	}
	if err := n.Netlink().LinkAdd(host); err != nil {
		if errors.Is(err, unix.EEXIST) {
			if _, there := in.Netlink().LinkByName(p.Device); there == nil {
				return &DeviceExistsError{Name: p.Device, InPod: true}
			}
			return &DeviceExistsError{Name: p.HostDevice}
		}
		return fmt.Errorf("make veth pair %s and %s: %w", p.HostDevice, p.Device, err)
	}
	defer func() {
		if err != nil { // takes the pod's end and all routes with it
			err = errors.Join(err, deleteLink(n, host))
		}
	}()
	if err := n.Netlink().LinkSetAlias(host, p.Alias); err != nil {
		return fmt.Errorf("set the alias of %s: %w", p.HostDevice, err)
	}
	if err := setPodEnd(in, p); err != nil {
		return fmt.Errorf("in the pod: %w", err)
	}
	if err := setHostEnd(n, host, p); err != nil {
		return err
	}
	// The end that came up first, the pod's, has a carrier only now, and drops packets until the kernel's queue of link
	// events has reached it. On a busy node the pod's first packet would be lost, and TCP retransmits that after a second.
	// Asking for one device makes the kernel process its event first (rtnl_getlink; a dump does not).
	end, err := in.Netlink().LinkByName(p.Device)
	if err != nil {
		return fmt.Errorf("in the pod: look up device %s: %w", p.Device, err)
	}
	for _, a := range p.Addrs {
		if err := in.AwaitLocal(end, a); err != nil {
			return fmt.Errorf("in the pod: %w", err)
		}
	}
	return nil
}

// setting is a file below /proc/sys/net.
type setting struct{ name, value string }

func setSysctls(n *link.Namespace, device string, all []setting) error {
	return n.Do(func() error {
		for _, s := range all {
			family, name, _ := strings.Cut(s.name, "/")
			path := filepath.Join("/proc/sys/net", family, "conf", device, name)
			// Reading first is cheap. Writing a value that is set already may take the lock of all devices. If that is
			// held, as on a node on which many pods start, the kernel does not wait for it but restarts the system call
			// again and again.
			if value, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(value)) == s.value {
				continue
			}
			if err := os.WriteFile(path, []byte(s.value), 0o644); err != nil {
				return fmt.Errorf("set %s to %s: %w", path, s.value, err)
			}
		}
		return nil
	})
}

// setPodEnd configures the device in the pod's namespace, which is n.
func setPodEnd(n *link.Namespace, p Pod) error {
	// containerd runs the plugin "loopback" before this one; other runtimes may not.
	if err := n.Netlink().LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	l, err := n.Netlink().LinkByName(p.Device)
	if err != nil {
		return fmt.Errorf("look up device %s: %w", p.Device, err)
	}
	if slices.ContainsFunc(p.Addrs, netip.Addr.Is6) {
		if err := setSysctls(n, p.Device, []setting{
			{"ipv6/disable_ipv6", "0"}, // some runtimes disable IPv6 in each new namespace
			{"ipv6/accept_ra", "0"},    // the routes are set here, whatever another pod advertises
			{"ipv6/accept_dad", "0"},   // makes the link-local address usable at once, too
		}); err != nil {
			return err
		}
	}
	if err := n.Netlink().LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", p.Device, err)
	}
	for _, a := range p.Addrs {
		addr := &netlink.Addr{IPNet: rtnl.IPNet(rtnl.Whole(a))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD // the lease guarantees that the address is unique
		}
		if err := n.Netlink().AddrAdd(l, addr); err != nil {
			return fmt.Errorf("add address %s to %s: %w", a, p.Device, err)
		}
		gateway := Gateway(a)
		if err := setNeighbour(n, l, gateway, p.HostMAC); err != nil {
			return err
		}
		for _, r := range []*netlink.Route{
			{Dst: rtnl.IPNet(rtnl.Whole(gateway)), Scope: netlink.SCOPE_LINK},
			{Gw: gateway.AsSlice()},
		} {
			r.LinkIndex, r.Family = l.Attrs().Index, rtnl.Family(a)
			if err := n.Netlink().RouteAdd(r); err != nil {
				return fmt.Errorf("add route %s: %w", routeString(*r), err)
			}
		}
	}
	return nil
}

// setHostEnd configures the node's end in the node's namespace, which is n.
func setHostEnd(n *link.Namespace, l *netlink.Veth, p Pod) error {
	var settings []setting
	if slices.ContainsFunc(p.Addrs, netip.Addr.Is4) {
		settings = append(settings,
			setting{"ipv4/forwarding", "1"},
			setting{"ipv4/rp_filter", "1"}) // strict: a pod sends from its own address only
	}
	switch {
	case slices.ContainsFunc(p.Addrs, netip.Addr.Is6):
		settings = append(settings,
			setting{"ipv6/disable_ipv6", "0"},
			setting{"ipv6/accept_ra", "0"},     // a pod is not a router for the node
			setting{"ipv6/addr_gen_mode", "1"}) // none: the link-local address is the gateway's
	case hasIPv6():
		// A pod without IPv6 could still advertise itself to the node as a router.
		settings = append(settings, setting{"ipv6/disable_ipv6", "1"})
	}
	if err := setSysctls(n, p.HostDevice, settings); err != nil {
		return err
	}
	if err := n.Netlink().LinkSetUp(l); err != nil {
		return fmt.Errorf("bring up %s: %w", p.HostDevice, err)
	}
	for _, a := range p.Addrs {
		if a.Is6() {
			gateway := &netlink.Addr{IPNet: rtnl.IPNet(netip.PrefixFrom(gateway6, 64)), Flags: unix.IFA_F_NODAD}
			if err := n.Netlink().AddrAdd(l, gateway); err != nil {
				return fmt.Errorf("add address %s to %s: %w", gateway6, p.HostDevice, err)
			}
		}
		if err := setNeighbour(n, l, a, p.MAC); err != nil {
			return err
		}
		r := routeTo(l, a, p.Sources)
		if err := setRoute(n, r); err != nil {
			if errors.Is(err, unix.EINVAL) && r.Src != nil {
				return fmt.Errorf("%w; is %s an address of this node?", err, r.Src)
			}
			return err
		}
	}
	return nil
}

// setForwarding enables forwarding where it is off, for the families of the addresses. Usually it is on.
func setForwarding(n *link.Namespace, addrs []netip.Addr) error {
	return n.Do(func() error {
		const ip4, ip6 = "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"
		if slices.ContainsFunc(addrs, netip.Addr.Is4) {
			if on, err := isOn(ip4); err != nil || !on {
				if err := errors.Join(err, os.WriteFile(ip4, []byte("1"), 0o644)); err != nil {
					return fmt.Errorf("switch on IPv4 forwarding: %w", err)
				}
			}
		}
		if !slices.ContainsFunc(addrs, netip.Addr.Is6) {
			return nil
		}
		on, err := isOn(ip6)
		if errors.Is(err, fs.ErrNotExist) {
			return errors.New("the pod is to have an IPv6 address, and the kernel has no IPv6")
		}
		if err != nil || on {
			return err
		}
		// With forwarding on, the kernel ignores router advertisements: a node that has its default route from one would
		// lose it, unless accept_ra is 2 (Documentation/networking/ip-sysctl.rst).
		listening, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
		if err != nil {
			return err
		}
		for _, path := range listening {
			if value, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(value)) == "1" && filepath.Base(filepath.Dir(path)) != "all" {
				if err := os.WriteFile(path, []byte("2"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return fmt.Errorf("keep the routes that routers advertise: %w", err)
				}
			}
		}
		if err := os.WriteFile(ip6, []byte("1"), 0o644); err != nil {
			return fmt.Errorf("switch on IPv6 forwarding: %w", err)
		}
		return nil
	})
}

func hasIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6")
	return err == nil
}

func isOn(path string) (bool, error) {
	value, err := os.ReadFile(path)
	return strings.TrimSpace(string(value)) == "1", err
}

func setNeighbour(n *link.Namespace, l netlink.Link, a netip.Addr, mac net.HardwareAddr) error {
	if err := n.Netlink().NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: rtnl.Family(a), State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac,
	}); err != nil {
		return fmt.Errorf("add neighbour %s on %s: %w", a, l.Attrs().Name, err)
	}
	return nil
}

// DeviceExistsError says that a device already has a name that Add was to use.
type DeviceExistsError struct {
	Name  string
	InPod bool
}

func (e *DeviceExistsError) Error() string {
	if e.InPod {
		return fmt.Sprintf("the pod has a device %s already", e.Name)
	}
	return fmt.Sprintf("the node has a device %s already", e.Name)
}

func sourceFor(to netip.Addr, sources []netip.Addr) net.IP {
	for _, s := range sources {
		if s.Is4() == to.Is4() {
			return s.AsSlice()
		}
	}
	return nil
}

// routeString writes a route as `ip route` does.
func routeString(r netlink.Route) string {
	var b strings.Builder
	b.WriteString("default")
	if r.Dst != nil && r.Dst.IP != nil {
		if ones, _ := r.Dst.Mask.Size(); ones > 0 {
			b.Reset()
			b.WriteString(r.Dst.String())
		}
	}
	if r.Gw != nil {
		fmt.Fprintf(&b, " via %s", r.Gw)
	}
	if r.Src != nil {
		fmt.Fprintf(&b, " src %s", r.Src)
	}
	return b.String()
}
