package podlink

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/rtnl"
)

// LivingPod is what the node's end of a pod's veth pair says about the pod. The pair ends with the namespace of either end,
// so a pod whose end is on the node still has its namespace.
type LivingPod struct {
	Device
	// Addrs are the addresses by which the node reaches the pod, from the node's own routes and neighbours. The pod's
	// namespace is not consulted: the pod may set any address there.
	Addrs []netip.Addr
	// Netns is where the pod's namespace is mounted, and PodEnd the name of the pod's end in it. Both are empty if it was
	// not found.
	Netns, PodEnd string
}

// LivingPods reads the pods that the node has devices of. It looks for their namespaces in the given directory.
func LivingPods(n *link.Namespace, namespaces string) ([]LivingPod, error) {
	links, err := rtnl.List(n.Netlink().LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	ends, _, err := Ends(n)
	if err != nil {
		return nil, err
	}
	addrs := map[string][]netip.Addr{}
	for _, e := range ends {
		all := slices.Concat(e.Routes, e.Neighbours) // either may have been lost
		slices.SortFunc(all, netip.Addr.Compare)
		addrs[e.Device] = slices.Compact(all)
	}
	paths := mounted(n, namespaces)
	var pods []LivingPod
	for _, l := range links {
		a := l.Attrs()
		if a.Group != Group || l.Type() != "veth" {
			continue
		}
		p := LivingPod{Device: deviceOf(a), Addrs: addrs[a.Name]}
		if path, found := paths[a.NetNsID]; found {
			if device, ok := deviceAt(path, a.ParentIndex); ok {
				p.Netns, p.PodEnd = path, device
			}
		}
		pods = append(pods, p)
	}
	return pods, nil
}

// mounted maps the IDs that this namespace has for others to the paths of those that are mounted in a directory. It has an
// ID for each namespace with the other end of one of its devices.
func mounted(n *link.Namespace, dir string) map[int]string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	paths := map[int]string{}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if !link.IsNamespace(path) {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // unmounted by now
		}
		if id, err := n.Netlink().GetNetNsIdByFd(int(f.Fd())); err == nil && id >= 0 {
			paths[id] = path
		}
		f.Close()
	}
	return paths
}

// deviceAt returns the name of a device in the namespace that is mounted at path.
func deviceAt(path string, index int) (name string, ok bool) {
	in, err := link.Open(path)
	if err != nil {
		return "", false
	}
	defer in.Close()
	l, err := in.Netlink().LinkByIndex(index)
	if err != nil {
		return "", false
	}
	return l.Attrs().Name, true
}

// routeTo is the node's route to a pod.
func routeTo(host netlink.Link, to netip.Addr, sources []netip.Addr) *netlink.Route {
	return &netlink.Route{
		Dst: rtnl.IPNet(rtnl.Whole(to)), LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK, Protocol: RouteProtocol,
		Src: sourceFor(to, sources),
	}
}

// setRoute adds or corrects the route to a pod. It never takes a route from another pod, whatever the leases say: then the
// error is AddressTakenError.
func setRoute(n *link.Namespace, r *netlink.Route) error {
	// With NLM_F_EXCL, so that reading the existing routes costs nothing in the usual case that there is none.
	err := n.Netlink().RouteAdd(r)
	if errors.Is(err, unix.EEXIST) {
		if err := mayReplace(n, r); err != nil {
			return err
		}
		err = n.Netlink().RouteReplace(r)
	}
	if err != nil {
		return fmt.Errorf("add route %s: %w", routeString(*r), err)
	}
	return nil
}

// mayReplace fails if there is a route to the same address by another pod's device.
func mayReplace(n *link.Namespace, r *netlink.Route) error {
	to := rtnl.Prefix(r.Dst).Addr()
	have, err := rtnl.List(func() ([]netlink.Route, error) {
		return n.Netlink().RouteListFiltered(rtnl.Family(to), &netlink.Route{Dst: r.Dst, Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_DST|netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return fmt.Errorf("look whose the route to %s is: %w", to, err)
	}
	for _, other := range have {
		if other.LinkIndex == r.LinkIndex {
			continue
		}
		l, err := n.Netlink().LinkByIndex(other.LinkIndex)
		if rtnl.IsGone(err) {
			continue
		}
		if err != nil {
			return fmt.Errorf("look whose the route to %s is: %w", to, err)
		}
		if a := l.Attrs(); a.Group == Group {
			return &AddressTakenError{Addr: to, Device: a.Name, Alias: a.Alias}
		}
	}
	return nil
}

// AddressTakenError says that another existing pod has the address.
type AddressTakenError struct {
	Addr          netip.Addr
	Device, Alias string // the other pod's
}

func (e *AddressTakenError) Error() string {
	return fmt.Sprintf("another pod has the address %s, by device %s (%s); delete one of the two", e.Addr, e.Device, e.Alias)
}
