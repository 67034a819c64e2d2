package cni

import (
	"errors"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/fathom-network/fathom/internal/lease"
	"github.com/fathom-network/fathom/internal/link"
)

// Swept is what Sweep took away.
type Swept struct {
	Leases  []lease.Lease
	Devices []string // that no lease had
	// Damaged are the names of leases that could not be read.
	Damaged []string
	// Kept are the leases that are left, of whatever network.
	Kept []lease.Lease
}

// Sweep takes back the leases of a network that are not valid, with their devices, and then the network's devices
// and the addresses that no lease has. It goes on after an error. Pods may come and go meanwhile. valid is also told
// whether the lease's device is present.
func Sweep(node *link.Namespace, store *lease.Store, network string, valid func(l lease.Lease, present bool) bool) (Swept, error) {
	var swept Swept
	// Devices before leases: a device comes after its lease and goes before it, so that one which is there now and
	// whose lease is not there then, has none.
	devices, err := node.PodDevices()
	if err != nil {
		return swept, err
	}
	leases, err := store.List()
	if err != nil {
		return swept, err
	}
	var errs []error
	present, leased := map[string]bool{}, map[string]bool{}
	for _, d := range devices {
		present[d.Name] = true
	}
	for _, l := range leases {
		leased[l.HostDevice] = true
		if l.Network != network || valid(l, present[l.HostDevice]) {
			swept.Kept = append(swept.Kept, l)
			continue
		}
		if err := detach(node.DeletePod, store, l); err != nil {
			errs, swept.Kept = append(errs, err), append(swept.Kept, l)
			continue
		}
		swept.Leases = append(swept.Leases, l)
	}
	for _, d := range devices {
		if leased[d.Name] || !isOf(network, d) {
			continue
		}
		if err := node.DeletePod(d.Name, d.Alias); err != nil {
			errs = append(errs, err)
			continue
		}
		swept.Devices = append(swept.Devices, d.Name)
	}
	swept.Damaged, err = store.Repair()
	return swept, errors.Join(append(errs, err)...)
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
	_, err = Sweep(node, store, c.Name, func(l lease.Lease, _ bool) bool { return c.valid == nil || c.valid[l.Attachment] })
	return asError("take back what is not valid", err)
}
