package dataplane

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/lease"
	"github.com/fathom-network/fathom/internal/link"
	"github.com/fathom-network/fathom/internal/nodestate"
	"github.com/fathom-network/fathom/internal/podnet"
)

// repairPods gives pods back what the node has lost of them, and the MTU that the network has now.
func (a *Agent) repairPods(leases []lease.Lease, plan podnet.Plan, own podnet.Node) error {
	ends, _, err := a.node.PodEnds()
	if err != nil {
		return err
	}
	byDevice := map[string]nodestate.PodEnd{}
	for _, e := range ends {
		byDevice[e.Device] = e
	}
	var errs []error
	for _, l := range leases {
		end, found := byDevice[l.HostDevice]
		if !found || intact(end, l, plan.PodMTU) {
			continue
		}
		if age := a.leases.Age(l); a.leases.OfThisBoot(l) && age < addPatience { // the plugin is about to do it
			a.lookIn(addPatience - age)
			continue
		}
		if err := a.repairPod(l, plan, own); err != nil {
			errs = append(errs, fmt.Errorf("repair pod %s/%s: %w", l.PodNamespace, l.PodName, err))
			continue
		}
		a.Log.Info("repaired a pod", "pod", l.PodNamespace+"/"+l.PodName, "device", l.HostDevice, "mtu", plan.PodMTU)
		a.metrics.repaired.Inc()
	}
	return errors.Join(errs...)
}

// addPatience is how long an ADD may take to make the routes of a pod before they count as lost.
const addPatience = 5 * time.Second

// intact says whether the node has what it takes to reach a pod.
func intact(end nodestate.PodEnd, l lease.Lease, mtu int) bool {
	for _, address := range l.Addresses {
		if !slices.Contains(end.Routes, address) || !slices.Contains(end.Neighbours, address) {
			return false
		}
	}
	return mtu == 0 || end.MTU == mtu
}

func (a *Agent) repairPod(l lease.Lease, plan podnet.Plan, own podnet.Node) error {
	pod, err := link.Open(filepath.Join(a.Paths.NetNS, filepath.Base(l.Netns)))
	if err != nil {
		return err
	}
	defer pod.Close()
	return a.node.RepairPod(pod, link.Pod{Device: l.IfName, HostDevice: l.HostDevice, MTU: plan.PodMTU, Addrs: l.Addresses, Sources: nodeAddresses(own)})
}
