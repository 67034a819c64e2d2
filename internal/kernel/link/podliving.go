package link

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LivingPod is what a node's end of a pod's veth pair tells of the pod. The pair ends with the namespace of either end,
// so that a pod of which the node has one has its namespace, too.
type LivingPod struct {
	PodDevice
	// Addrs are the addresses that the node reaches the pod by, as its own routes and neighbours have them: the pod's
	// namespace is not asked, in which the pod may call itself what it likes.
	Addrs []netip.Addr
	// Netns is where the pod's namespace is mounted, and Device the pod's end in it. Both are empty if it was not found.
	Netns, Device string
}

// LivingPods reads the pods that the node has devices of. Their namespaces are looked for in a directory.
func (n *Namespace) LivingPods(namespaces string) ([]LivingPod, error) {
	links, err := dump(n.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	ends, _, err := n.PodEnds()
	if err != nil {
		return nil, err
	}
	addrs := map[string][]netip.Addr{}
	for _, e := range ends {
		all := slices.Concat(e.Routes, e.Neighbours) // either may be lost
		slices.SortFunc(all, netip.Addr.Compare)
		addrs[e.Device] = slices.Compact(all)
	}
	paths := n.mounted(namespaces)
	var pods []LivingPod
	for _, l := range links {
		a := l.Attrs()
		if a.Group != PodGroup || l.Type() != "veth" {
			continue
		}
		p := LivingPod{PodDevice: podDevice(a), Addrs: addrs[a.Name]}
		if path, found := paths[a.NetNsID]; found {
			if device, ok := deviceAt(path, a.ParentIndex); ok {
				p.Netns, p.Device = path, device
			}
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// mounted returns where namespaces are mounted in a directory, by the numbers that this namespace has for them. It has
// one for each that has the other end of a device of it.
func (n *Namespace) mounted(dir string) map[int]string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	paths := map[int]string{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !isNamespace(path) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // it has gone
		}
		if id, err := n.nl.GetNetNsIdByFd(int(f.Fd())); err == nil && id >= 0 {
			paths[id] = path
		}
		f.Close()
	}
	return paths
}

// deviceAt returns the name of a device in the namespace that is mounted at path.
func deviceAt(path string, index int) (name string, ok bool) {
	in, err := Open(path)
	if err != nil {
		return "", false
	}
	defer in.Close()
	l, err := in.nl.LinkByIndex(index)
	if err != nil {
		return "", false
	}
	return l.Attrs().Name, true
}

// podRoute is the node's route to a pod.
func podRoute(host netlink.Link, to netip.Addr, sources []netip.Addr) *netlink.Route {
	return &netlink.Route{
		Dst: ipNet(whole(to)), LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK, Protocol: PodRouteProtocol,
		Src: sourceFor(to, sources),
	}
}

// setPodRoute makes the route to a pod, or corrects it. From another pod it takes none, whatever leases say: the error is
// AddressTakenError then.
func (n *Namespace) setPodRoute(r *netlink.Route) error {
	// Exclusively, so that a look at what there is costs nothing as long as there is nothing.
	err := n.nl.RouteAdd(r)
	if errors.Is(err, unix.EEXIST) {
		if err := n.mayReplace(r); err != nil {
			return err
		}
		err = n.nl.RouteReplace(r)
	}
	if err != nil {
		return fmt.Errorf("add route %s: %w", routeString(*r), err)
	}
	return nil
}

// mayReplace fails if there is a route to the same address by the device of another pod.
func (n *Namespace) mayReplace(r *netlink.Route) error {
	to := prefixOf(r.Dst).Addr()
	have, err := dump(func() ([]netlink.Route, error) {
		return n.nl.RouteListFiltered(family(to), &netlink.Route{Dst: r.Dst, Protocol: PodRouteProtocol, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_DST|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("look whose the route to %s is: %w", to, err)
	}
	for _, other := range have {
		if other.LinkIndex == r.LinkIndex {
			continue
		}
		l, err := n.nl.LinkByIndex(other.LinkIndex)
		if isGone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look whose the route to %s is: %w", to, err)
		}
		if a := l.Attrs(); a.Group == PodGroup {
			return &AddressTakenError{Addr: to, Device: a.Name, Alias: a.Alias}
		}
	}
	return nil
}

// AddressTakenError says that an address was to be a pod's which another pod has, that is there.
type AddressTakenError struct {
	Addr          netip.Addr
	Device, Alias string // of the pod that has it
}

func (e *AddressTakenError) Error() string {
	return fmt.Sprintf("%s is the address of another pod that is there, by device %s (%s); one of the two has to be deleted", e.Addr, e.Device, e.Alias)
}
