package cni

import (
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// Swept is what Sweep took away.
type Swept struct {
	Leases []lease.Lease
	// Rebuilt are the leases that were lost, in whole or in part, and made again of the devices of their pods.
	Rebuilt []lease.Lease
	// Damaged are the names of leases that could not be read.
	Damaged []string
	// Kept are the leases that are left, of whatever network.
	Kept []lease.Lease
}

// Sweep makes leases of a network again that were lost although their devices are there, and takes back those that are not
// valid, with their devices, and the addresses that no lease has. After an error of one it goes on. Pods may come and go
// meanwhile. valid is also told whether the lease's device is present.
func Sweep(node *link.Namespace, store *lease.Store, network Network, valid func(l lease.Lease, present bool) bool) (Swept, error) {
	var swept Swept
	// Devices before leases: a device comes after its lease and goes before it, so that one which is there now and
	// whose lease is not there then, has none.
	devices, err := podlink.Devices(node)
	if err != nil {
		return swept, err
	}
	leases, err := store.List()
	if err != nil {
		return swept, err
	}
	present := map[string]bool{}
	for _, d := range devices {
		present[d.Name] = isOf(network.Name, d)
	}
	if isLost(store, present, leases) {
		// What cannot be rebuilt now is not taken for gone either.
		if swept.Rebuilt, err = Rebuild(node, store, network); err != nil {
			return swept, err
		}
		if leases, err = store.List(); err != nil {
			return swept, err
		}
	}
	var errs []error
	for _, l := range leases {
		_, present := present[l.HostDevice]
		if l.Network != network.Name || valid(l, present) {
			swept.Kept = append(swept.Kept, l)
			continue
		}
		if err := detach(node, podlink.Delete, store, l); err != nil {
			errs, swept.Kept = append(errs, err), append(swept.Kept, l)
			continue
		}
		swept.Leases = append(swept.Leases, l)
	}
	swept.Damaged, err = store.Repair()
	return swept, errors.Join(append(errs, err)...)
}

// isLost says whether a device has no lease, or one that has lost an address. devices are those that are present, and
// whether each is of the network.
func isLost(store *lease.Store, devices map[string]bool, leases []lease.Lease) bool {
	leased := map[string]bool{}
	for _, l := range leases {
		leased[l.HostDevice] = true
		if devices[l.HostDevice] && !store.IsWhole(l) {
			return true
		}
	}
	for name, ours := range devices {
		if ours && !leased[name] {
			return true
		}
	}
	return false
}

// gc sweeps with what the runtime holds to be valid. A runtime that does not say what is gets only what nobody has
// any more taken back: the alternative would be to detach every pod of the node.
func (p plugin) gc(args *skel.CmdArgs) error {
	c, err := parse(args, true)
	if err != nil {
		return asError("read the configuration", err)
	}
	node, err := link.Here()
	if err != nil {
		return asError("open the node's namespace", err)
	}
	defer node.Close()
	store, err := lease.Open(c.DataDir, c.CoolDown)
	if err != nil {
		return asError("open the leases", err)
	}
	_, err = Sweep(node, store, c.network(store), func(l lease.Lease, _ bool) bool {
		return c.valid == nil || slices.ContainsFunc(c.valid, func(a lease.Attachment) bool { return isFor(l, a) })
	})
	return asError("take back what is not valid", err)
}
