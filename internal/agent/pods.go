package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/fathom-network/fathom/internal/facts/podnet"
	"github.com/fathom-network/fathom/internal/kernel/lease"
	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// repairPods restores what the node has lost of its pods, and sets the present MTU.
func (a *Agent) repairPods(leases []lease.Lease, plan podnet.Plan, sources []netip.Addr) error {
	ends, _, err := podlink.Ends(a.node)
	if err != nil {
		return err
	}
	byDevice := map[string]podnet.PodEnd{}
	for _, e := range ends {
		byDevice[e.Device] = e
	}
	var errs []error
	for _, l := range leases {
		end, found := byDevice[l.HostDevice]
		if !found || intact(end, l, plan.PodMTU, sources) {
			continue
		}
		if age := a.leases.Age(l); a.leases.OfThisBoot(l) && age < addPatience { // an ADD in progress is about to do it
			a.lookIn(addPatience - age)
			continue
		}
		if err := a.repairPod(l, plan, sources); err != nil {
			errs = append(errs, fmt.Errorf("repair pod %s/%s: %w", l.PodNamespace, l.PodName, err))
			continue
		}
		a.Log.Info("repaired a pod", "pod", l.PodNamespace+"/"+l.PodName, "device", l.HostDevice, "mtu", plan.PodMTU)
		a.metrics.repaired.Inc()
	}
	return errors.Join(errs...)
}

// podSources returns the source addresses of the node's routes to its pods: one of each family by which the API knows the node, if
// the node has it. The kernel removes routes with their source address; until the API knows another, the kernel chooses the
// source.
func podSources(own podnet.Node, local map[netip.Addr]bool) []netip.Addr {
	own.Addrs = slices.DeleteFunc(slices.Clone(own.Addrs), func(a netip.Addr) bool { return !local[a] })
	return nodeAddresses(own)
}

// addPatience is how long an ADD may take to make a pod's routes before they count as lost.
const addPatience = 5 * time.Second

// intact reports whether the node has the routes and neighbours of a pod, with the right sources and MTU.
func intact(end podnet.PodEnd, l lease.Lease, mtu int, sources []netip.Addr) bool {
	for _, address := range l.Addresses {
		if !slices.Contains(end.Routes, address) || !slices.Contains(end.Neighbours, address) {
			return false
		}
		var source netip.Addr
		if i := slices.IndexFunc(sources, func(s netip.Addr) bool { return s.Is4() == address.Is4() }); i >= 0 {
			source = sources[i]
		}
		if end.Sources[address] != source {
			return false
		}
	}
	return mtu == 0 || end.MTU == mtu
}

func (a *Agent) repairPod(l lease.Lease, plan podnet.Plan, sources []netip.Addr) error {
	pod, err := link.Open(filepath.Join(a.Paths.NetNS, filepath.Base(l.Netns)))
	if err != nil {
		return err
	}
	defer pod.Close()
	return podlink.Repair(a.node, pod, podlink.Pod{Device: l.IfName, HostDevice: l.HostDevice, MTU: plan.PodMTU, Addrs: l.Addresses, Sources: sources})
}
