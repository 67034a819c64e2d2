package cni

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/fathom-network/fathom/internal/facts/inet"
	"github.com/fathom-network/fathom/internal/facts/ipam"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// Network is what is known of a network to who makes leases of it again that were lost.
type Network struct {
	Name string
	// Namespaces is the directory in which the runtime mounts pods' namespaces.
	Namespaces string
	// Pools returns those that an address may be of.
	Pools func() []ipam.Pool
}

// Rebuild makes those leases again that were lost although their pod is there, of the pod's device.
func Rebuild(node *link.Namespace, store *lease.Store, n Network) ([]lease.Lease, error) {
	pools := n.Pools() // not under the store's lock, for which who has another may be waiting
	return store.Rebuild(func() ([]lease.Lease, error) {
		pods, err := podlink.LivingPods(node, n.Namespaces)
		if err != nil {
			return nil, err
		}
		var leases []lease.Lease
		for _, p := range pods {
			if isOf(n.Name, p.Device) {
				leases = append(leases, n.leaseOf(p, pools))
			}
		}
		return leases, nil
	})
}

// leaseOf is what a device tells of its lease.
func (n Network) leaseOf(p podlink.LivingPod, pools []ipam.Pool) lease.Lease {
	l := lease.Lease{Network: n.Name, Netns: p.Netns, HostDevice: p.Name, Alias: p.Alias, Addresses: p.Addrs, Pool: poolOf(p.Addrs, pools)}
	// The last word is missing where the alias was too long.
	kind, rest, _ := strings.Cut(strings.TrimPrefix(p.Alias, n.Name+" "), " ")
	who, device, _ := strings.Cut(rest, " ")
	l.IfName = cmp.Or(p.PodEnd, device, "eth0")
	if kind == "pod" {
		l.PodNamespace, l.PodName, _ = strings.Cut(who, "/")
		l.Attachment = lease.StandIn(p.Name, l.IfName)
	} else {
		l.ContainerID = who
	}
	return l
}

// poolOf names the pool that has all the addresses, if there is one.
func poolOf(addresses []netip.Addr, pools []ipam.Pool) string {
	for _, p := range pools {
		if !slices.ContainsFunc(addresses, func(a netip.Addr) bool {
			return !inet.Contains(slices.Concat(p.Ranges, p.Fixed), a)
		}) {
			return p.Name
		}
	}
	return ""
}

// isFor says whether the lease is an attachment's, whose own it may be or one that was made again of its device.
func isFor(l lease.Lease, a lease.Attachment) bool {
	if l.Attachment == a {
		return true
	}
	for attempt := range attempts {
		if l.Rebuilt && l.IfName == a.IfName && l.HostDevice == hostDevice(l.PodName, a, attempt) {
			return true
		}
	}
	return false
}

// Release cuts off the pod that has an address, and takes its lease back: as long as the device is there, so is the pod,
// and the lease would be made again.
func Release(node *link.Namespace, store *lease.Store, address netip.Addr) error {
	l, found, err := store.Holder(address)
	if err != nil {
		return err
	}
	if found {
		if err := detach(node, podlink.Delete, store, l); err != nil {
			return err
		}
	}
	return store.ReleaseAddress(address) // one that is damaged, or has no attachment
}
