package fastpath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/facts/diff"
	"github.com/fathom-network/fathom/internal/kernel/bpf"
	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
)

// Changes counts what Set changed.
type Changes struct {
	Programs, Pods, Remotes diff.Count
}

// Total is the number of changes.
func (c Changes) Total() int {
	n := 0
	for _, x := range []diff.Count{c.Programs, c.Pods, c.Remotes} {
		n += x.Added + x.Corrected + x.Removed
	}
	return n
}

func (c Changes) String() string {
	return fmt.Sprintf("programs %v, pods %v, remotes %v", c.Programs, c.Pods, c.Remotes)
}

// Set makes the kernel hold the plan. It is idempotent, and a failure of one part does not stop the others.
//
// At no time may a connection's packets be redirected in one direction only: conntrack would see half of it, and other
// programs' rules may drop packets that it considers invalid. So a pod becomes fast in both directions at once, after
// everything else is in place, and becomes slow before anything is removed.
func (p *Path) Set(plan Plan) (Changes, error) {
	s, err := p.compare(plan)
	if err != nil {
		return Changes{}, err
	}
	s.slowDownPods()
	s.forgetFlows()
	s.attachToWires()
	s.writeRemotes()
	s.writePorts()
	s.writePods()
	s.replaceOnWires()
	s.attachToPods()
	s.finishPods()

	s.deleteRemotes()
	s.detachFromWires()
	s.deletePods()
	s.deletePorts()
	return s.changes, errors.Join(s.errs...)
}

// setter is one run of Set. Wires are the devices by which packets from other nodes arrive.
type setter struct {
	*Path
	names      map[int]string // of devices, by index
	want, have state
	changes    Changes
	errs       []error
}

// compare reads what the kernel holds and computes what the plan wants. If a part of the plan cannot be computed, that is
// among the setter's errors.
func (p *Path) compare(plan Plan) (*setter, error) {
	s := &setter{Path: p}
	var err error
	// The maps are read before the devices: an entry without a device is then stale, not new.
	if s.have, err = p.readMaps(); err != nil {
		return nil, err
	}
	if s.names, err = p.node.Names(); err != nil {
		return nil, err
	}
	filters, err := p.node.Filters()
	if err != nil {
		return nil, err
	}
	s.want, err = p.wanted(plan, filters)
	s.errs = append(s.errs, err)
	return s, p.readAttached(&s.have, s.names, filters)
}

// note records an error, if there is one, with what was attempted.
func (s *setter) note(what string, err error) {
	if err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s: %w", what, err))
	}
}

func (s *setter) writePod(key pin.Key, pod pin.Pod) {
	s.note("write the map "+pin.Pods, s.objects.FathomPods.Update(key, pod, ebpf.UpdateAny))
}

// slowDownPods sends packets to the stack of pods that are redirected and should not be.
func (s *setter) slowDownPods() {
	for key, w := range s.want.pods {
		if h, there := s.have.pods[key]; there && h.Stack == 0 && w.Stack != 0 {
			s.writePod(key, w)
			s.have.pods[key] = w
			s.changes.Pods.Corrected++
		}
	}
}

// forgetFlows forgets the connections of addresses that will take the fast path and do not yet: the stack has seen some of their packets, or they were
// another pod's.
func (s *setter) forgetFlows() {
	others := ^pin.Policy
	of := map[netip.Addr]bool{}
	for key, w := range s.want.pods {
		h, there := s.have.pods[key]
		if w.Stack&others == 0 && (!there || h.Stack&others != 0 || h.Index != w.Index || h.MAC != w.MAC) {
			of[key.Addr()] = true
		}
	}
	if len(of) == 0 {
		return
	}
	list, err := s.judge.Flows()
	s.note("forget connections", err)
	s.note("forget connections", s.judge.Forget(slices.DeleteFunc(list, func(f Flow) bool { return !of[f.Source.Addr()] && !of[f.Destination.Addr()] })))
}

// attachToWires attaches the program to wires that have none.
func (s *setter) attachToWires() {
	for index := range s.want.fromNet {
		if _, there := s.have.fromNet[index]; !there {
			s.attachToWire(index)
			s.changes.Programs.Added++
		}
	}
}

func (s *setter) attachToWire(index int) {
	s.note("device "+s.names[index], attach(s.node, s.Support.TCX, index, pin.FromNet, s.objects.FathomWire))
}

func (s *setter) writeRemotes() {
	for key, w := range s.want.remotes {
		if h, there := s.have.remotes[key]; !there || h != w {
			s.note("write the map "+pin.Remotes, s.objects.FathomRemotes.Update(key, w, ebpf.UpdateAny))
			s.changes.Remotes.Added++
		}
	}
}

func (s *setter) writePorts() {
	for index, w := range s.want.ports {
		if h, there := s.have.ports[index]; !there || h != w {
			s.note("write the map "+pin.Ports, s.objects.FathomPorts.Update(index, w, ebpf.UpdateAny))
		}
	}
}

// writePods writes the pods that are missing from the map or have another device there. A pod whose device has no program
// yet stays slow.
func (s *setter) writePods() {
	for key, w := range s.want.pods {
		h, there := s.have.pods[key]
		if there && h.Index == w.Index && h.MAC == w.MAC && h.HostMAC == w.HostMAC {
			continue
		}
		if _, has := s.have.fromPod[int(w.Index)]; !has {
			w.Stack |= pin.New
		}
		s.writePod(key, w)
		s.have.pods[key] = w
		s.changes.Pods.Added++
	}
}

// replaceOnWires replaces other versions' programs on wires.
func (s *setter) replaceOnWires() {
	for index := range s.want.fromNet {
		if current, there := s.have.fromNet[index]; there && !current {
			s.attachToWire(index)
			s.changes.Programs.Corrected++
		}
	}
}

// attachToPods attaches the program to pods' devices, and replaces other versions. If that fails for a device, its pod
// stays slow.
func (s *setter) attachToPods() {
	for index := range s.want.fromPod {
		current, there := s.have.fromPod[index]
		if current {
			continue
		}
		if err := attach(s.node, s.Support.TCX, index, pin.FromPod, s.objects.FathomPod); err != nil {
			if !isGone(err) { // the pod was deleted concurrently
				s.note("device "+s.names[index], err)
			}
			for key, w := range s.want.pods {
				if int(w.Index) == index {
					w.Stack |= pin.New
					s.want.pods[key] = w
				}
			}
			continue
		}
		if there {
			s.changes.Programs.Corrected++
		} else {
			s.changes.Programs.Added++
		}
	}
}

// finishPods writes the pods' final entries. From here on their packets are redirected, where the plan allows it.
func (s *setter) finishPods() {
	for key, w := range s.want.pods {
		if s.have.pods[key] != w {
			s.writePod(key, w)
			s.changes.Pods.Corrected++
		}
	}
}

func (s *setter) deleteRemotes() {
	for key := range s.have.remotes {
		if _, wanted := s.want.remotes[key]; !wanted {
			s.note("delete from the map "+pin.Remotes, bpf.IgnoreMissing(s.objects.FathomRemotes.Delete(key)))
			s.changes.Remotes.Removed++
		}
	}
}

func (s *setter) detachFromWires() {
	for index := range s.have.fromNet {
		if _, wanted := s.want.fromNet[index]; !wanted {
			s.note("device "+s.names[index], detach(s.node, s.Support.TCX, index, pin.FromNet))
			s.changes.Programs.Removed++
		}
	}
}

// deletePods deletes the addresses whose device is gone. An existing device with an address that is not wanted is either
// being made, or has lost only some of its addresses.
func (s *setter) deletePods() {
	for key, h := range s.have.pods {
		_, wanted := s.want.pods[key]
		_, there := s.names[int(h.Index)]
		if !wanted && !there {
			s.note("delete from the map "+pin.Pods, s.forget(key, h))
			s.changes.Pods.Removed++
		}
	}
}

func (s *setter) deletePorts() {
	for index := range s.have.ports {
		if _, there := s.names[int(index)]; !there {
			s.note("delete from the map "+pin.Ports, bpf.IgnoreMissing(s.objects.FathomPorts.Delete(index)))
		}
	}
}

// forget deletes a pod's address, unless the plugin has given it to another pod concurrently.
func (p *Path) forget(key pin.Key, h pin.Pod) error {
	var last pin.Pod
	if err := p.objects.FathomPods.LookupAndDelete(key, &last); err != nil {
		return bpf.IgnoreMissing(err)
	}
	if last.Index != h.Index {
		return p.objects.FathomPods.Update(key, last, ebpf.UpdateNoExist)
	}
	return nil
}

func isGone(err error) bool { return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) }
